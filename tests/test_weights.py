"""Weights are read row by row into the parameters of a rank, or refused before any is."""

import json

import pytest
import torch
from many_ranks import join, on_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from toy_models import QUERY, assert_holds, write_model, write_shards

from models.export import export
from models.weights import INDEX, SINGLE, build, load, on_meta


def resave(directory, change):
    state = load_file(directory / SINGLE)
    change(state)
    save_file(state, directory / SINGLE)


def truncate(directory):
    content = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(content[:-100])


def shards_without(name):
    def damage(directory):
        write_shards(directory)
        (directory / SINGLE).unlink(missing_ok=True)
        (directory / name).unlink()

    return damage


def broken_index(directory):
    shards_without("a.safetensors")(directory)
    (directory / INDEX).write_text("[]")


def index_says(change):
    def damage(directory):
        shards = write_shards(directory)
        (directory / SINGLE).unlink(missing_ok=True)
        index = {name: "a.safetensors" for name in shards} | change
        (directory / INDEX).write_text(json.dumps({"weight_map": index}))

    return damage


def rename(state, prefix=None):
    """Names without "model.", or with a prefix before all."""
    for name in list(state):
        state[prefix + name if prefix else name.removeprefix("model.")] = state.pop(name)


# claim -> (damage, error, what the message holds)
DAMAGES = {
    "missing-tensor": (
        lambda d: resave(d, lambda state: state.pop(QUERY)),
        ValueError,
        (QUERY, "is missing", "fetch both again"),
    ),
    "missing-untied-head": (
        lambda d: resave(d, lambda state: state.pop("lm_head.weight")),
        ValueError,
        ("lm_head.weight", "is missing"),
    ),
    "surplus-tensor": (
        lambda d: resave(d, lambda state: state.update(extra=torch.zeros(2))),
        ValueError,
        ("extra", "has no place", "fetch both again"),
    ),
    "wrong-shape": (
        lambda d: resave(d, lambda state: state.update({QUERY: torch.zeros(8, 10)})),
        ValueError,
        (QUERY, "(8, 10)", "(12, 8)", "fetch both"),
    ),
    "quantised": (
        lambda d: resave(
            d, lambda state: state.update({QUERY: torch.zeros(12, 8, dtype=torch.int8)})
        ),
        ValueError,
        (QUERY, "I8", "BF16"),
    ),
    "truncated-file": (truncate, ValueError, (SINGLE, "truncated", "download it again")),
    "not-safetensors": (
        lambda d: (d / SINGLE).write_text("<html>404</html>"),
        ValueError,
        (SINGLE, "not a safetensors file"),
    ),
    "no-weights": (
        lambda d: (d / SINGLE).unlink(),
        FileNotFoundError,
        (SINGLE, INDEX, "only safetensors are read"),
    ),
    "missing-shard": (
        shards_without("b.safetensors"),
        FileNotFoundError,
        ("b.safetensors", INDEX, "fetch it again"),
    ),
    "broken-index": (broken_index, ValueError, (INDEX, "fetch it again")),
    "index-of-other-files": (index_says({}), ValueError, (INDEX, "do not agree", "fetch both")),
    "index-out-of-the-directory": (
        index_says({QUERY: "../a.safetensors"}),
        ValueError,
        (INDEX, "fetch it again"),
    ),
    "no-prefix": (
        lambda d: resave(d, rename),
        ValueError,
        ("the file calls it embed_tokens.weight", "save the whole model"),
    ),
    "other-prefix": (
        lambda d: resave(d, lambda state: rename(state, "_orig_mod.")),
        ValueError,
        ("the file calls it _orig_mod.model.embed_tokens.weight", "save the whole model"),
    ),
    "other-frequencies": (
        lambda d: resave(d, lambda state: state.update({"x.rotary_emb.inv_freq": torch.ones(3)})),
        ValueError,
        ("inv_freq", "rope_theta"),
    ),
}


@pytest.mark.parametrize("damage, kind, fragments", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused_before_anything_is_copied(damage, kind, fragments, tmp_path):
    write_model(tmp_path)
    damage(tmp_path)
    model = on_meta(tmp_path).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    with pytest.raises(kind) as error:
        load(model, tmp_path)
    assert_holds(error, str(tmp_path), *fragments)
    assert all((parameter == 7.0).all() for parameter in model.parameters())


def test_a_model_still_on_meta_is_refused(tmp_path):
    write_model(tmp_path)
    with pytest.raises(ValueError) as error:
        load(on_meta(tmp_path), tmp_path)
    assert_holds(error, "embed_tokens", "to_empty")


def test_shards_are_read_like_one_file(tmp_path):
    state = write_shards(tmp_path)
    for name, parameter in build(tmp_path, "cpu", torch.float32).named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_tensors_that_repeat_what_the_model_has_are_left_out(tmp_path):
    state = write_model(tmp_path, tie_word_embeddings=True)
    repeated = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    repeated["model.layers.0.self_attn.rotary_emb.inv_freq"] = 1e4 ** (-torch.arange(0, 6, 2) / 6)
    save_file(state | repeated, tmp_path / SINGLE)
    model = build(tmp_path, "cpu", torch.float32)
    assert "lm_head.weight" not in model.state_dict()
    assert torch.equal(model.head, state["model.embed_tokens.weight"])


def test_a_tied_head_may_stand_for_the_embedding_but_not_differ_from_it(tmp_path):
    state = write_model(tmp_path, tie_word_embeddings=True)
    embedding = state.pop("model.embed_tokens.weight")
    save_file(state | {"lm_head.weight": embedding}, tmp_path / SINGLE)
    assert torch.equal(build(tmp_path, "cpu", torch.float32).head, embedding)
    other = {"lm_head.weight": embedding + 1, "model.embed_tokens.weight": embedding}
    save_file(state | other, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"tie_word_embeddings true, but .* set it to false"):
        build(tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_keep_their_dtype_whatever_is_stored(stored, tmp_path):
    state = {name: tensor.to(stored) for name, tensor in write_model(tmp_path).items()}
    save_file(state, tmp_path / SINGLE)
    for name, parameter in build(tmp_path, "cpu", torch.float32).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state[name].float()), name


def rank_reads_its_rows(rank, port, directory):
    """Run on 2 ranks: sharded parameters hold the stored rows, and are exported as they were."""
    join(rank, 2, port)
    model = on_meta(directory)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    load(model, directory)
    stored = load_file(directory / SINGLE)
    for name, parameter in model.named_parameters():
        assert parameter.to_local().shape[0] < stored[name].shape[0], f"{name} is not sharded"
        assert torch.equal(parameter.full_tensor(), stored[name]), name
    for dtype, out in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        export(model.state_dict(), directory, directory / out, dtype, 500, rank)
    (directory / "in-the-way").touch()
    try:
        export(model.state_dict(), directory, directory / "in-the-way", dtype, 500, rank)
        refused = False
    except FileExistsError:  # only rank 0 writes; the other has gathered with it all the same
        refused = True
    torch.save(refused, directory / f"rank{rank}.pt")


@pytest.mark.slow
def test_each_rank_reads_and_exports_its_rows_even_when_they_do_not_divide(tmp_path):
    state = write_model(tmp_path)  # 31 vocabulary rows on 2 ranks
    assert on_ranks(2, tmp_path, rank_reads_its_rows) == [True, False]
    for dtype, out in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        files = sorted((tmp_path / out).glob("*.safetensors"))
        written = {name: t for path in files for name, t in load_file(path).items()}
        assert len(files) > 5 and written.keys() == state.keys()
        assert all(torch.equal(t, state[name].to(dtype)) for name, t in written.items())
