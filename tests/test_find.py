"""A model is found where it is, and what cannot be found or computed is refused with a reason."""

import json

import pytest
from toy_models import assert_holds, write_config, write_model

from models.config import TINY, ModelConfig
from models.shapes import SHAPES, as_hugging_face
from models.weights import find


def test_a_directory_is_its_own_name(tmp_path):
    assert find(str(tmp_path)) == tmp_path


def test_tiny_is_the_model_in_assets():
    assert find("tiny") == TINY


def test_weights_directory_comes_before_our_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours, inside = tmp_path / "cache/rmt/smollm2-135m", tmp_path / "weights/smollm2-135m"
    write_config(ours)
    assert find("smollm2-135m") == ours
    write_config(inside)
    assert find("smollm2-135m", weights=tmp_path / "weights") == inside
    assert find("smollm2-135m", weights=inside) == inside


def test_weights_directory_that_is_a_model_answers_for_its_own_name_only(offline, tmp_path):
    """Else a run with two names, a policy and a proxy for difficulty, takes one for both."""
    place = tmp_path / "download"
    write_config(place, **as_hugging_face(SHAPES["smollm2-135m"]))
    assert find("smollm2-135m", weights=place) == place
    with pytest.raises(FileNotFoundError, match="no weights of qwen3-14b"):
        find("qwen3-14b", weights=place)


def test_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError) as error:
        find("qwen3-14")
    assert_holds(error, "qwen3-14 ", "Did you mean qwen3-14b?", "tiny", "r1-distill-qwen-7b")


def test_weights_that_are_no_directory_do_not_start_a_download(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find("qwen3-14b", weights=tmp_path / "typo")
    assert_holds(error, "typo", "leave it out")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and an empty Hugging Face cache at the path returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("download", [True, False])
def test_offline_the_error_says_what_to_run(offline, download):
    with pytest.raises(FileNotFoundError) as error:
        find("qwen3-14b", download=download)
    assert_holds(error, "hf download Qwen/Qwen3-14B --local-dir", "--weights DIR")
    assert "smollm2" not in str(error.value)
    with pytest.raises(FileNotFoundError) as error:
        find("smollm2-135m", download=download)
    assert_holds(error, "hf download HuggingFaceTB/SmolLM2-135M-Instruct", "make smollm2")


def test_hugging_face_cache_is_used_only_when_it_holds_the_weights(offline):
    repository = offline / "models--Qwen--Qwen3-0.6B"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    write_config(snapshot)
    with pytest.raises(FileNotFoundError):
        find("qwen3-0.6b")
    write_model(snapshot)
    assert find("qwen3-0.6b", download=False) == snapshot


REFUSED_CONFIGS = {
    "architecture": (
        {"architectures": ["GemmaForCausalLM"]},
        ("GemmaForCausalLM", "LlamaForCausalLM"),
    ),
    "no-architecture": ({"architectures": None}, ("(none)", "Qwen3ForCausalLM")),
    "rope-scaling": ({"rope_scaling": {"type": "yarn"}}, ("'yarn'", "remove the scaling if")),
    "rope-in-two-fields": (
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}},
        ("rope_parameters.rope_theta is 500000.0", "10000.0"),
    ),
    "yarn-beside-default": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
        ("'yarn'", "'default'", "keep the right one"),
    ),
    "layers-as-text": ({"num_hidden_layers": "2", "layer_types": ["x"]}, ("num_hidden_layers",)),
    "theta-as-list": ({"rope_theta": [1]}, ("rope_theta is '[1]'",)),
    "softcapping": ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping",)),
    "rope-parameters": ({"rope_parameters": {"rope_type": "longrope"}}, ("'longrope'", "remove")),
    "sliding-window": ({"use_sliding_window": True}, ("use_sliding_window=True", "only False")),
    "window-of-mistral": (
        {
            "architectures": ["MistralForCausalLM"],
            "sliding_window": 4095,
            "max_position_embeddings": 4096,
        },
        ("sliding_window=4095", "max_position_embeddings 4096", "lower max_position"),
    ),
    "window-of-mistral-by-default": (
        {"architectures": ["MistralForCausalLM"]},
        ("sliding_window=4096", "max_position_embeddings 131072", "lower max_position"),
    ),
    "window-as-text": (
        {"architectures": ["MistralForCausalLM"], "sliding_window": "no"},
        ("sliding_window is 'no'",),
    ),
    "layers-with-a-window": (
        {"architectures": ["Olmo2ForCausalLM"], "layer_types": ["sliding_attention"] * 2},
        ("layer_types",),
    ),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "only 'silu'")),
    "attention-bias": ({"attention_bias": True}, ("attention_bias",)),
    "sees-what-follows": ({"is_causal": False}, ("is_causal=False", "only True is")),
    "other-weights": ({"transformers_weights": "a.safetensors"}, ("transformers_weights",)),
    "padding-outside": ({"pad_token_id": 31}, ("pad_token_id 31", "vocab_size 31", "remove it")),
}


@pytest.mark.parametrize("changes, fragments", REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS)
def test_a_config_we_cannot_compute_is_refused(changes, fragments, tmp_path):
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        ModelConfig.from_directory(tmp_path)
    assert_holds(error, "config.json", *fragments)


def test_a_missing_field_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        ModelConfig.from_directory(tmp_path)
    assert_holds(error, str(tmp_path / "config.json"), "--model takes")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(ValueError) as error:
        ModelConfig.from_directory(tmp_path)
    assert_holds(error, "num_attention_heads", "missing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError) as error:
        ModelConfig.from_directory(tmp_path)
    assert_holds(error, "not valid JSON", "fetch it again")


def test_an_adapter_alone_is_called_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"has an adapter .* merge it into the weights"):
        ModelConfig.from_directory(tmp_path)
