"""Weights are read row by row into the parameters of a rank, or refused before any is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import (
    QUERY,
    assert_holds,
    random_state,
    write_config,
    write_model,
    write_shards,
)

from models.export import export
from models.weights import INDEX, SINGLE, build, load, on_meta

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


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


def test_tensors_that_repeat_what_the_model_has_are_ignored(tmp_path):
    state = write_model(tmp_path, tie_word_embeddings=True)
    repeated = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    repeated["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(state | repeated, tmp_path / SINGLE)
    model = build(tmp_path, "cpu", torch.float32)
    assert "lm_head.weight" not in model.state_dict()
    assert torch.equal(model.head, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_keep_their_dtype_whatever_is_stored(stored, tmp_path):
    state = {name: tensor.to(stored) for name, tensor in write_model(tmp_path).items()}
    save_file(state, tmp_path / SINGLE)
    for name, parameter in build(tmp_path, "cpu", torch.float32).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state[name].float()), name


MEMORY_SCRIPT = """
import sys, threading
from pathlib import Path
import torch
from safetensors.torch import load_file
from models.weights import SINGLE, load, on_meta

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024  # MiB

def watch():
    while not done.is_set():
        peaks.append(anonymous())
        done.wait(0.0005)

torch.set_num_threads(1)
directory = Path(sys.argv[1])
model = on_meta(directory).to_empty(device="cpu")
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)
before, peaks, done = anonymous(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
load(model, directory)
done.set()
thread.join()
stored = load_file(directory / SINGLE)
assert all(torch.equal(p, stored[name].float()) for name, p in model.named_parameters())
print(max(peaks) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_reading_takes_no_second_copy_of_a_tensor(tmp_path):
    """The embedding is a parameter of 246 MiB in fp32, 123 MiB in the file; reading may take 64.

    On a CPU blocks are views of the file and take none: the limit matters on the way to a GPU.
    """
    changes = {"vocab_size": 252_000, "hidden_size": 256, "tie_word_embeddings": True}
    write_config(tmp_path, **changes)
    state = {name: t.bfloat16() for name, t in random_state(**changes).items()}
    save_file(state, tmp_path / SINGLE)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 80, f"{result.stdout} MiB"


def rank_reads_its_rows(rank, directory):
    """Run on 2 ranks: sharded parameters hold the stored rows; they cannot be exported."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
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
    with pytest.raises(ValueError, match="gather a full state dict"):
        export(model.state_dict(), directory, directory / "out", torch.float32)
    dist.destroy_process_group()


@pytest.mark.slow
def test_each_rank_reads_its_rows_even_when_they_do_not_divide(tmp_path):
    write_model(tmp_path)  # 31 vocabulary rows on 2 ranks
    torch.multiprocessing.spawn(rank_reads_its_rows, args=(tmp_path,), nprocs=2)
