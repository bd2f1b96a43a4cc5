"""An export opens in transformers, says what its source said, and is written all or nothing."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from toy_models import QUERY, assert_holds, causal, write_model, write_tokenizer

import models.export as exporting
from models.export import export
from models.weights import INDEX, SINGLE, build

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
ARCHITECTURES = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "head_dim": 4},
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama-scaled": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 1e3,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3-scaled": {
        "model_type": "qwen3",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "beta_fast": 8,
            "original_max_position_embeddings": 64, "truncate": False,
        },
    },
    "mistral": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None,
    },
    "olmo2": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "pad_token_id": 1},
}  # fmt: skip


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("shard_bytes", [10**9, 1000], ids=["one-file", "many-shards"])
def test_export_opens_in_transformers_with_equal_logits(changes, shard_bytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, **changes)
    ours = build(source, "cpu", torch.float32)
    export(ours.state_dict(), source, out, torch.float32, max_shard_bytes=shard_bytes)
    assert (out / SINGLE).is_file() == (shard_bytes == 10**9)
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        positions = torch.arange(len(TOKENS))
        logits = ours(TOKENS, positions, causal, lambda hidden, head: hidden @ head.T)
        assert (opened(TOKENS[None]).logits[0] - logits).abs().max() <= 1e-6


def test_export_keeps_tokenizer_and_every_field_of_the_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    source, out = tmp_path / "source", tmp_path / "out"
    extra = {"a_field_of_tomorrow": [1, "ü"], "dtype": "float32", "model_type": "qwen3"}
    state = write_model(source, **extra)
    write_tokenizer(source, merges=[("l", "a")])
    template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    export(state, source, out, torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 257}
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (source, out))
    text = "the lazy fox 🦊"
    assert before.encode(text) == after.encode(text)
    assert before.chat_template == after.chat_template == template
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_generation_config_of_the_source_is_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    state = write_model(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    export(state, source, out, torch.float32)
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": [5, 6]}'
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_failed_export_leaves_the_earlier_one_untouched(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    state = write_model(source)
    export(state, source, out, torch.float32)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    broken = state | {"model.norm.weight": torch.empty(8, device="meta")}
    with pytest.raises(NotImplementedError):
        export(broken, source, out, torch.float32, max_shard_bytes=100)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("killed", ["while it wrote", "between both renames"])
def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path, killed):
    source, out = tmp_path / "source", tmp_path / "out"
    state = write_model(source)
    export(state, source, out, torch.float32)
    (tmp_path / ".out.0123456789abcdef.new").mkdir()
    (tmp_path / ".out.0123456789abcdef.new" / "half").write_text("")
    if killed == "between both renames":
        out.rename(tmp_path / ".out.0123456789abcdef.old")
    broken = state | {"model.norm.weight": torch.empty(8, device="meta")}
    with pytest.raises(NotImplementedError):  # what was there is back all the same
        export(broken, source, out, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", SINGLE]


def test_two_exports_at_one_time_leave_one_whole_model(tmp_path, monkeypatch):
    """The second begins and ends while the first writes; both may have one process number."""
    source, out = tmp_path / "source", tmp_path / "out"
    state, write, begun = write_model(source), exporting._write, []
    other = {name: tensor + 1 for name, tensor in state.items()}

    def slow(*given):
        write(*given)
        if not begun:
            begun.append(True)
            export(other, source, out, torch.float32)
            assert torch.equal(
                load_file(out / SINGLE)["model.norm.weight"], other["model.norm.weight"]
            )

    monkeypatch.setattr(exporting, "_write", slow)
    export(state, source, out, torch.float32)
    assert torch.equal(load_file(out / SINGLE)["model.norm.weight"], state["model.norm.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_new_export_replaces_every_file_of_the_earlier_one(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    state = write_model(source)
    (tmp_path / "out").mkdir()
    export(state, source, out, torch.float32, max_shard_bytes=1000)
    assert (out / INDEX).is_file()
    export(state, source, out, torch.float32)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", SINGLE]
    assert os.stat(out / SINGLE).st_mode == os.stat(out / "config.json").st_mode


def test_shards_stay_below_their_limit_and_the_index_counts_them(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    state = write_model(source)
    export(state, source, out, torch.float32, max_shard_bytes=1000)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in state.values())
    assert set(index["weight_map"]) == set(state)
    for file in set(index["weight_map"].values()):
        assert sum(4 * t.numel() for t in load_file(out / file).values()) <= 1000


@pytest.mark.parametrize("content", ["notes.txt", "config.json"])
def test_a_directory_that_is_no_export_is_never_overwritten(content, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    state = write_model(source)
    out.mkdir()
    (out / content).write_text("mine")
    with pytest.raises(FileExistsError) as error:
        export(state, source, out, torch.float32)
    assert_holds(error, str(out), content, "choose another")
    assert (out / content).read_text() == "mine"


def test_the_source_and_a_file_are_never_overwritten(tmp_path):
    state = write_model(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "source", tmp_path / "file"):
        with pytest.raises(FileExistsError, match="choose another"):
            export(state, tmp_path / "source", out, torch.float32)


def test_a_state_of_another_model_is_not_exported(tmp_path):
    state = write_model(tmp_path / "source")
    state.pop(QUERY)
    with pytest.raises(ValueError) as error:
        export(state, tmp_path / "source", tmp_path / "out", torch.float32)
    assert_holds(error, QUERY, "is missing")
    assert not (tmp_path / "out").exists()
