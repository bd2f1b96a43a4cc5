"""Adapters: gradients by the chain rule, on one rank and two, and what others read of them."""

import json
import shutil

import pytest
import torch
from many_ranks import join
from small_run import (
    arguments,
    equal,
    metrics,
    refusal,
    run_here,
    weights,
    write_corpus,
    write_small_model,
)
from test_distributed import assert_same_metrics
from toy_forests import assert_same_gradients, set_adapters
from toy_models import causal
from toy_runs import WORLD, prepared
from two_ranks import fresh_model, learn, on_two_ranks, steps, whole

import train
from models.export import write_adapters
from models.lora import add_adapters
from models.weights import build, load, on_meta
from rmt.engine import export
from rmt.engine.checkpoint import export_model
from rmt.system import dist

RANK = 3
SHORT = dict(batch_size=5, steps=3, learning_rate=1e-2, samples_per_step=9, lora_rank=RANK,
             kl_beta=0.1, updates_per_batch=2)  # fmt: skip
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


# ---- gradients


def sharded(run):
    """The run's model in float64 with adapters, on this rank."""
    model = on_meta(run.model_dir).double()
    add_adapters(model, RANK, torch.float64)
    if run.world.size > 1:
        dist.shard(model, run.world, torch.float64)
    model.to_empty(device="cpu")
    load(model, run.model_dir)
    return set_adapters(model)


def merged_by_hand(run, adapters):
    """A plain model whose matrices are W + 2 B A, and the names of those."""
    model, names = fresh_model(run, torch.float64), []
    with torch.no_grad():
        for name, p in model.named_parameters():
            low = name.removesuffix("weight")
            if low + "lora_A" in adapters:
                p += 2 * adapters[low + "lora_B"] @ adapters[low + "lora_A"]
                names.append(name)
    return model, names


def gradients(world, place):
    """Metrics, gradients and adapters before them, of uneven shares of the same trees."""
    run = prepared(place, world, grad_clip=1e9)
    model = sharded(run)
    before = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    export_model(model, run.model_dir, place / f"out{world.size}", torch.float64, world)
    done = learn(run, "uneven", model=model)
    return dict(done, before=before, place=place)


def in_bfloat16(world, place):
    """What a run in bf16 holds before and after, and what the sampler is given."""
    run = prepared(place, world, dtype="bfloat16", **SHORT)
    of = lambda model: {name: whole(p) for name, p in model.named_parameters()}
    before, rows = of(run.model), steps(run)["rows"]
    with dist.gathered_weights(run.model) as sampler:
        given = of(sampler)
    return dict(before=before, after=of(run.model), given=given, rows=rows)


def everything(world, place):
    return dict(
        gradients(world, place),
        steps=steps(prepared(place, world, **SHORT)),
        offloaded=steps(prepared(place, world, offload=True, recompute="full", **SHORT)),
        bfloat16=in_bfloat16(world, place),
    )


def _work(rank, port, place):
    torch.save(everything(join(rank, 2, port), place), place / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of one process, of rank 0 and of rank 1."""
    place = tmp_path_factory.mktemp("ranks")
    prepared(place)
    return [everything(WORLD, place), *on_two_ranks(place, _work)]


@pytest.mark.slow
def test_gradients_are_those_of_merged_weights_by_the_chain_rule(answers, tmp_path):
    run, adapters = prepared(tmp_path, grad_clip=1e9), answers[0]["before"]
    model, names = merged_by_hand(run, adapters)
    done = learn(run, "uneven", model=model)
    wanted = {}
    for low in (name.removesuffix("weight") for name in names):
        a, b, g = adapters[low + "lora_A"], adapters[low + "lora_B"], done["gradients"]
        g = g[low + "weight"]
        wanted |= {low + "lora_A": 2 * b.T @ g, low + "lora_B": 2 * g @ a.T}
    assert len(names) == 14
    for answer in answers:
        assert answer["metrics"]["loss/rl"] == pytest.approx(done["metrics"]["loss/rl"], rel=1e-9)
        assert_same_gradients(answer["gradients"], wanted, 1e-9)
        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
        assert answer["metrics"]["update/grad_norm"] == pytest.approx(float(norm), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["steps", "offloaded"])
def test_runs_do_not_depend_on_ranks_nor_on_where_weights_are(answers, name):
    one = answers[0]["steps"]
    assert one["rows"][-1]["policy/kl"] > 0
    for answer in answers:
        for given, expected in zip(answer[name]["rows"], one["rows"]):
            assert_same_metrics(given, expected, 1e-4, absolute=1e-5)
            assert given["sampler_gap/max"] < 1e-4


@pytest.mark.slow
def test_two_ranks_export_the_bits_of_one(answers):
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = ((answers[0]["place"] / f"out{n}" / file).read_bytes() for n in (1, 2))
        assert one == two, file


@pytest.mark.slow
def test_frozen_weights_stay_in_bf16_and_masters_of_adapters_in_fp32(answers):
    for answer in (a["bfloat16"] for a in answers):
        for name, value in answer["after"].items():
            learnt = name.endswith(("lora_A", "lora_B"))
            assert value.dtype == (torch.float32 if learnt else torch.bfloat16), name
            assert torch.equal(value, answer["before"][name]) != learnt, name
            assert torch.equal(answer["given"][name].bfloat16(), value.bfloat16()), name
    assert_same_metrics(*(a["bfloat16"]["rows"][-1] for a in answers[1:]), 1e-9)


# ---- runs, and what others read of them


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/, train.jsonl and run/, which has ended."""
    place = tmp_path_factory.mktemp("run")
    write_small_model(place / "model", model_type="qwen3")
    write_corpus(place / "train.jsonl")
    run_here(*lora_run(place))
    return place


def lora_run(place, **changes):
    own = dict(lora_rank=RANK, learning_rate=1e-2, steps=4, save_every=2, keep=9, kl_beta=0.1)
    return arguments(place, **own | changes)


def test_a_resumed_run_ends_with_the_same_bits(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    for ended in ("checkpoints/step-000004", "model", "adapter"):
        shutil.rmtree(tmp_path / "run" / ended)
    run_here("--resume", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(place / "run")
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (place / "run" / file).read_bytes()


def test_a_checkpoint_holds_what_is_trained(place):
    folder = place / "run/checkpoints/step-000004"
    saved = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata()
    for part, count in (("model.", 28), ("optimizer.state.", 3 * 28)):  # step and two moments
        names = [n for n in saved.state_dict_metadata if n.startswith(part)]
        assert len(names) == count and all("lora_" in n for n in names), names


def test_a_checkpoint_is_exported_as_the_run_was(place, tmp_path):
    export.main([str(place / "run/checkpoints/step-000004"), str(tmp_path / "hf")])
    assert equal(weights(tmp_path / "hf"), weights(place / "run/model"))
    before, after = weights(place / "model"), weights(tmp_path / "hf")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if "_proj.weight" in n}


def logits_of(directory):
    ours = build(directory, "cpu", torch.float32)
    with torch.no_grad():
        positions = torch.arange(len(TOKENS))
        return ours(TOKENS, positions, causal, lambda hidden, head: hidden @ head.T)


def test_merged_weights_open_in_transformers_with_equal_logits(place):
    transformers = pytest.importorskip("transformers")
    opened = transformers.AutoModelForCausalLM.from_pretrained(place / "run/model")
    wanted = logits_of(place / "run/model")
    with torch.no_grad():
        assert (opened(TOKENS[None]).logits[0] - wanted).abs().max() <= 1e-5
    assert (wanted - logits_of(place / "model")).abs().max() > 1e-3


def test_adapters_open_in_peft_with_equal_logits(place):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    described = json.loads((place / "run/adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(place / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    opened = peft.PeftModel.from_pretrained(base, place / "run/adapter")
    with torch.no_grad():
        found = opened(TOKENS[None]).logits[0]
    assert (found - logits_of(place / "run/model")).abs().max() <= 1e-5
    tensors = peft.get_peft_model_state_dict(opened)
    assert len(tensors) == 28  # each found its place
    own = {f"{name}.weight" for name in ("lora_A", "lora_B")}
    assert {".".join(n.split(".")[-2:]) for n in tensors} == own


def test_a_run_starts_from_a_run_with_adapters(place, tmp_path):
    run_here(*lora_run(place, model=place / "run", out=tmp_path / "next", steps=1, lora_rank=2))
    described = json.loads((tmp_path / "next/adapter/adapter_config.json").read_text())
    assert described["r"] == 2 and described["lora_alpha"] == 4


def test_ranks_that_cannot_be_are_refused(place, tmp_path, capsys):
    new = dict(out=tmp_path / "new")
    refuse = lambda arguments, *words: refusal(train, arguments, words, capsys)
    refuse(lora_run(place, lora_rank=-1, **new), "--lora-rank is -1", "0 or more")
    refuse(lora_run(place, lora_rank=99, **new), "--lora-rank 99 exceeds", "take 16 or less")
    planned = ["--model", "qwen3-8b", "--lora-rank", 2000, "--dry-run"]
    refuse(planned, "--lora-rank 2000 exceeds", "take 1024 or less")
    for other in (0, 8):
        again = ["--resume", place / "run", "--lora-rank", other]
        refuse(again, f"--lora-rank {other}", f"trains with --lora-rank {RANK}", "start anew")


def test_a_changed_base_is_not_merged_with_adapters(place, tmp_path, capsys):
    source = place / "model/model.safetensors"
    before = source.read_bytes()
    source.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        words = (f"weights of {place / 'model'}", "old files")
        refusal(export, [place / "run", tmp_path / "hf"], words, capsys)
    finally:
        source.write_bytes(before)


def test_adapters_of_another_run_are_not_replaced(place, tmp_path, capsys):
    other = tmp_path / "run/adapter"
    other.mkdir(parents=True)
    words = (f"holds a model already, {other}", "move it away")
    refusal(train, lora_run(place, out=tmp_path / "run", steps=1), words, capsys)
    (other / "mine").write_text("")  # it appears while a run goes on
    with pytest.raises(FileExistsError, match="adapter is not an earlier export"):
        write_adapters({}, "base", other)
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # beside an export, too
        (other / name).write_text("")
    with pytest.raises(FileExistsError, match="adapter is not an earlier export"):
        write_adapters({}, "base", other)
    assert (other / "mine").is_file()
