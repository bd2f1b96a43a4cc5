"""Our transformer is Hugging Face's, for every architecture and in both directions."""

import pytest
import torch
import torch.nn.functional as F
from toy_models import causal

from models.config import ModelConfig
from models.transformer import Transformer
from models.weights import build

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,  # OLMo 2's default of 1 would never be trained
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {  # keeps, blends and divides at least one frequency of 6
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512,
    "beta_fast": 16,
}  # fmt: skip
# claim -> (model type of transformers, what differs from BASE)
CASES = {
    "qwen3-with-tied-head": ("qwen3", {"tie_word_embeddings": True, "head_dim": 12}),
    "qwen3-with-head-dim-above-hidden-over-heads": ("qwen3", {"head_dim": 32}),
    "qwen3-with-one-key-head": ("qwen3", {"head_dim": 8, "num_key_value_heads": 1}),
    "qwen3-with-large-rope-theta": (
        "qwen3",
        {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2-with-tied-head": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-with-untied-head": ("qwen2", {}),
    "qwen2-without-grouped-heads": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-with-large-epsilon": ("qwen2", {"rms_norm_eps": 1e-2}),
    "llama-with-tied-head": ("llama", {"tie_word_embeddings": True}),
    "llama-with-untied-head": ("llama", {"num_key_value_heads": 1}),
    "llama-with-explicit-head-dim": ("llama", {"head_dim": 16}),
    "llama-scaled-as-llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2-scaled-by-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-scaled-by-yarn": ("qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "mistral-scaled-by-yarn-to-fractions-of-an-index": (
        "mistral",
        {"sliding_window": None, "rope_parameters": YARN | {"truncate": False, "beta_slow": 2}},
    ),
    "olmo2-scaled-by-yarn-with-an-attention-factor": (
        "olmo2",
        {"rope_parameters": YARN | {"attention_factor": 1.5}},
    ),
    "mistral-without-a-window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-with-a-window-of-the-context": ("mistral", {"sliding_window": 128}),
    "olmo2": ("olmo2", {}),
    "olmo2-with-tied-head-and-all-key-heads": (
        "olmo2",
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
}
TOKENS = torch.randint(0, 97, (23,), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens=TOKENS, positions=None):
    positions = torch.arange(len(tokens)) if positions is None else positions
    return model(tokens, positions, causal, lambda hidden, head: hidden @ head.T)  # (N, V)


def random_reference(kind, changes):
    """A random model of transformers whose every parameter, norms and biases too, has an effect."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **(BASE | {"rope_parameters": ROPE} | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def reference(request):
    return random_reference(*request.param)


def test_logits_are_those_of_transformers(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    ours = build(tmp_path, "cpu", torch.float32)
    with torch.no_grad():
        expected = reference(TOKENS[None]).logits[0]
        error = (logits_of(ours) - expected).abs().max()
    assert expected.std() > 0.3, "the reference says nothing"
    assert error <= 1e-4, error


def test_logits_at_long_positions_are_those_of_transformers(reference, tmp_path):
    """Up to 125,422, as after a long document; the frequencies have the same bits."""
    reference.save_pretrained(tmp_path)
    ours, positions = build(tmp_path, "cpu", torch.float32), 5701 * torch.arange(len(TOKENS))
    with torch.no_grad():
        mask = torch.ones(1, len(TOKENS))  # so that it takes no gap for a new document
        expected = reference(TOKENS[None], position_ids=positions[None], attention_mask=mask)
        error = (logits_of(ours, positions=positions) - expected.logits[0]).abs().max()
        moved = (logits_of(ours) - expected.logits[0]).abs().max()
    assert error <= 1e-4 and moved > 1e-3, (error, moved)


def test_gradients_are_those_of_transformers(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    ours = build(tmp_path, "cpu", torch.float32)
    F.cross_entropy(reference(TOKENS[None]).logits[0, :-1], TOKENS[1:]).backward()
    F.cross_entropy(logits_of(ours)[:-1], TOKENS[1:]).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name].grad).abs().max()
        assert error <= 1e-4, f"{name}: {error}"


def test_positions_are_the_ones_given(tmp_path):
    reference = random_reference("qwen3", {"head_dim": 12})
    reference.save_pretrained(tmp_path)
    positions = torch.arange(len(TOKENS)) + 40 * (torch.arange(len(TOKENS)) > 10)
    with torch.no_grad():
        # With a mask given, transformers does not take the gap for the start of a new document.
        expected = reference(
            TOKENS[None], position_ids=positions[None], attention_mask=torch.ones(1, len(TOKENS))
        ).logits[0]
        ours = build(tmp_path, "cpu", torch.float32)
        assert (logits_of(ours, positions=positions) - expected).abs().max() <= 1e-4
        assert (logits_of(ours) - expected).abs().max() > 1e-2


def test_bfloat16_stays_close_to_float32(tmp_path):
    random_reference("qwen3", {"head_dim": 12}).save_pretrained(tmp_path)
    with torch.no_grad():
        exact = logits_of(build(tmp_path, "cpu", torch.float32))
        rough = logits_of(build(tmp_path, "cpu", torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_reset_parameters_is_decided_by_its_seed():
    config = ModelConfig.from_dict(BASE | {"architectures": ["Qwen2ForCausalLM"]})
    first, same, other = (Transformer(config) for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        model.reset_parameters(seed)
    weights = [m.state_dict()["model.layers.2.mlp.up_proj.weight"] for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.state_dict()["model.layers.0.self_attn.q_proj.bias"].abs().max() == 0
