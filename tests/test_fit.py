"""Knobs that fit a machine: chosen by a dry run as by a real one; what does not fit is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from many_ranks import join
from small_run import refusal, run_here
from test_plan import SMALL, case
from toy_runs import WORLD, prepared
from two_ranks import on_two_ranks, steps

import rmt.rollout as rollout_module
import train
from benchmarks.memory_table import BEGIN, END, table
from models.kv_cache import KVCache
from models.shapes import published
from rmt.config.config import Config, parse
from rmt.config.flags import read_bytes
from rmt.memory.autofit import DoesNotFit, autofit, described, fit, most_branches
from rmt.memory.dry_run import PROMPT
from rmt.memory.estimate import (
    MOST_BRANCHES,
    Case,
    branch,
    cached_tokens,
    rollout,
    total,
    update,
)
from rmt.prompt import PromptIds
from rmt.questions import ask, prompts_of, question_trees, sampling_at
from rmt.rollout import generate
from rmt.system import dist

ROOT = Path(__file__).resolve().parent.parent


def qwen3_14b(**machine) -> Case:
    """The paper's setting: the command of the README."""
    config = Config(**{"model": "qwen3-14b"} | machine)
    return Case(config, published("qwen3-14b"), torch.bfloat16, PROMPT, described(config))


def test_qwen3_14b_fits_eight_gpus_of_80_gb_with_the_papers_values():
    chosen = fit(qwen3_14b())
    assert (chosen.config.batch_size, chosen.config.group_size) == (128, 8)
    assert chosen.config.max_branches >= 32
    assert total(update(chosen)) <= chosen.machine.room


def test_what_does_not_fit_is_refused_with_changes_that_fit():
    with pytest.raises(
        DoesNotFit, match=r"needs all weights on every GPU: .*gathered.*"
    ) as refused:
        fit(qwen3_14b(gpus=4, gpu_memory="24GB"))
    ways = str(refused.value).split("What fits: ")[1].split("; ")
    assert ways
    for way in ways:
        words = ["--model", "qwen3-14b", "--gpus", "4", "--gpu-memory", "24GB", *way.split()]
        config = parse(words, "", "")
        fit(replace(qwen3_14b(), config=config, machine=described(config)))


def test_a_group_across_nodes_has_buffers_of_its_own():
    rooms = [
        described(Config(gpus=8, nodes=nodes, replicate=replicate)).room
        for nodes, replicate in ((1, 0), (2, 1), (2, 0))
    ]
    assert rooms[0] == rooms[1] > rooms[2] > 0


def test_an_evaluation_plans_what_it_holds_not_what_a_step_of_training_would():
    alone = replace(qwen3_14b(gpus=1), trainable=False)
    asked = [replace(alone, config=replace(alone.config, batch_size=n)) for n in (1, 4096)]
    assert fit(asked[0]).config.max_branches == fit(asked[1]).config.max_branches >= 64
    with pytest.raises(DoesNotFit) as refused:
        fit(replace(alone, machine=described(replace(alone.config, gpu_memory="34GB"))))
    said = str(refused.value)  # eval.py has no other flags of these
    assert said.endswith("use a GPU with more memory") and "--" not in said  # no flag helps


def test_what_an_evaluation_caches_is_blamed_on_no_flag_of_training():
    small = dict(model="qwen3-8b", lora_rank=16, batch_size=8, document_tokens=512, gpus=1,
                 max_response=1024, gpu_memory="22GB")  # fmt: skip
    of = lambda **more: replace(qwen3_14b(**small | more), shape=published("qwen3-8b"))
    fit(of())
    with pytest.raises(DoesNotFit) as refused:
        fit(of(eval_data=("x",)))
    said = str(refused.value)
    assert "the same without --eval-data" in said
    assert "--batch-size" not in said and "--document-tokens" not in said


@pytest.mark.parametrize("positions", [1, 5])
def test_the_plan_caches_the_prompts_of_all_questions(tmp_path, monkeypatch, positions):
    run, held = prepared(tmp_path, positions_per_document=positions), []
    full = [i for i, d in enumerate(run.documents) if len(d.tokens) > 30]
    questions = [
        ask(run.config, run.data, i, len(run.documents[i].tokens) - 1 - n, 9)
        for i in full for n in range(positions)
    ]  # fmt: skip
    cache = rollout_module.KVCache
    counting = lambda *a, **more: held.append(a[1] + a[2]) or cache(*a, **more)
    monkeypatch.setattr(rollout_module, "KVCache", counting)
    prompts = prompts_of(run.config, run.tokenizer, questions)
    trees = question_trees(questions, run.documents, prompts)
    generate(run.model, trees, 2, sampling_at(run.config, run.tokenizer, 0))
    longest = max(len(run.documents[i].tokens) for i in full)
    c = replace(run.config, batch_size=len(full), document_tokens=longest, probe_documents=0)
    known = Case(c, run.model.config, torch.float32, prompts[0], described(Config(gpus=1)))
    short = sum(longest - len(run.documents[i].tokens) for i in full)
    assert 0 <= cached_tokens(known) - short - held[0] <= 2 * len(questions)


def test_offload_makes_room():
    plain, offloaded = (qwen3_14b(gpus=1, gpu_memory="141GB", offload=x) for x in (False, True))
    with pytest.raises(DoesNotFit, match=r"What fits: --offload"):
        fit(plain)
    assert fit(offloaded).config.max_branches > 1


def test_qwen3_8b_with_adapters_fits_a_card_of_24_gb(capsys):
    small = ["--gpu-memory", "24GB", "--gpus", 1, "--batch-size", 8, "--document-tokens", 512,
             "--max-response", 1024]  # fmt: skip
    run_here("--model", "qwen3-8b", "--lora-rank", 16, "--dry-run", *small)
    printed = capsys.readouterr().out
    assert "fits: 20.8 of 22.2 GB" in printed
    assert printed in (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    refusal(train, ["--model", "qwen3-8b", "--dry-run", *small], ["What fits: --"], capsys)


@pytest.mark.parametrize(
    "model, memory, flags, fits",
    [
        ("qwen3-0.6b", "24GB", [], "20.5 of 22.2 GB"),
        ("qwen3-1.7b", "80GB", [], "66.0 of 75.4 GB"),
        ("qwen3-1.7b", "24GB", ["--lora-rank", 32, "--learning-rate", "2e-5"], "22.0 of 22.2 GB"),
    ],
)
def test_the_preset_for_one_gpu_fits_as_the_docs_say(model, memory, flags, fits, capsys):
    known = ("--preset", "one-gpu", "--model", model, *flags)
    run_here(*known, "--dry-run", "--gpus", 1, "--gpu-memory", memory)
    assert f"fits: {fits}" in capsys.readouterr().out
    (line,) = [x for x in (ROOT / "docs/running.md").read_text(encoding="utf-8").splitlines()
               if x.split("#")[0].split() == ["python", "train.py", *map(str, known)]]  # fmt: skip
    assert line.endswith(f"{memory[:2]} GB, {fits}")


def test_given_knobs_are_kept_and_refused_when_they_do_not_fit():
    given = qwen3_14b(recompute="full", tokens_per_micro_batch=8192, max_branches=8)
    assert fit(given).config == given.config
    with pytest.raises(DoesNotFit, match=r"--max-branches 4096 needs .* the same without"):
        fit(qwen3_14b(max_branches=4096))


def test_more_memory_never_means_fewer_branches_or_more_recomputation():
    order = ("full", "selective", "none")
    configs = [fit(qwen3_14b(gpu_memory=f"{m}GB")).config for m in (80, 96, 141, 192)]
    assert [c.max_branches for c in configs] == sorted(c.max_branches for c in configs)
    assert [order.index(c.recompute) for c in configs] == sorted(
        order.index(c.recompute) for c in configs
    )


def test_branches_fill_what_is_left_in_whole_tiles():
    given = qwen3_14b()
    held, own = total(rollout(given)), sum(branch(given))
    for branches, fewer in {1: None, 2: 1, 8: 4, 16: 8, 64: 48}.items():
        room = held + branches * own
        at = lambda room: most_branches(replace(given, machine=replace(given.machine, room=room)))
        assert at(room + 1e6) == branches
        if fewer:
            assert at(room - 1e6) == fewer
    assert at(1e15) == MOST_BRANCHES
    with pytest.raises(DoesNotFit, match=r"each response 0\.3 GB; lower --batch-size"):
        at(held)


def test_a_branch_is_its_part_of_the_cache():
    given = case()
    caches = [KVCache(SMALL, 1, 0, n, 296 + 1, torch.device("cpu"), torch.bfloat16) for n in (1, 3)]
    sizes = [sum(x.nbytes for x in (c.trunk, c.prompt, c.own)) for c in caches]
    assert len(PROMPT.footer) + given.config.max_response == 296
    assert sizes[1] - sizes[0] == 2 * branch(given)[0]


def test_a_run_on_a_cpu_plans_its_open_knobs(tmp_path):
    run = prepared(tmp_path)
    assert run.config.max_branches > 0 and run.config.tokens_per_micro_batch == 16384
    assert run.config.recompute == run.model.model.layers[0].recompute == "full"
    given = replace(run.config, recompute="none", max_branches=3)
    assert autofit(given, PromptIds((), ()), run.model, run.compute, WORLD) == given


def test_a_cpu_without_memory_says_so_and_tries_what_it_is_told(tmp_path, monkeypatch):
    run = prepared(tmp_path)
    monkeypatch.setattr("rmt.memory.autofit.free_memory", lambda world: 0.0)
    known = (PromptIds((), ()), run.model, run.compute, WORLD)
    with pytest.raises(DoesNotFit, match="; or set --max-branches, which is then used as given"):
        autofit(replace(run.config, max_branches=0), *known)
    given = replace(run.config, max_branches=3, recompute="auto")
    assert autofit(given, *known) == replace(given, recompute="full")


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5", 1.5e9)])
def test_amounts_of_memory_are_read(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80TB", "many", "80 GBs"])
def test_other_words_for_memory_are_refused(text):
    with pytest.raises(ValueError, match="write 80GB"):
        read_bytes(text)


# ---- the command and the docs


def test_dry_run_prints_phases_and_knobs(capsys):
    run_here("--model", "tiny", "--dry-run", "--gpus", "2", "--gpu-memory", "8GB")
    printed = capsys.readouterr().out
    for name in ("rollout", "update", "master weights", "KV cache", "fits: "):
        assert name in printed
    assert re.search(r"--max-branches \d+ --tokens-per-micro-batch \d+ .*--recompute none", printed)
    assert not torch.distributed.is_initialized()


def test_dry_run_of_what_does_not_fit_exits_with_the_remedy(capsys):
    arguments = ["--model", "qwen3-14b", "--dry-run", "--gpus", "4", "--gpu-memory", "24GB"]
    refusal(train, arguments, ["GB of gathered weights, together", "What fits: --"], capsys)


def test_table_of_the_docs_is_that_of_the_planner():
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table()


# ---- offload


def _offloaded(rank, port, place):
    world, results = join(rank, 2, port), []
    for offload in (False, True):
        run = prepared(place, world, offload=offload, dtype="bfloat16", batch_size=4, steps=3)
        results.append(steps(run))
        with dist.gathered_weights(run.model) as sampler:
            gathered = sampler.model.norm.weight
            assert gathered.dtype == torch.bfloat16 and not hasattr(gathered, "to_local")
    torch.save(results, place / f"rank{rank}.pt")


@pytest.mark.slow
def test_offloaded_training_has_the_same_losses_and_responses(tmp_path):
    prepared(tmp_path)
    for plain, offloaded in on_two_ranks(tmp_path, _offloaded):
        assert plain["responses"] == offloaded["responses"]
        for one, other in zip(plain["rows"], offloaded["rows"]):
            for name in ("loss/rl", "loss/ntp", "update/grad_norm"):
                assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
