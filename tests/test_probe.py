"""Probes: the same positions again and again, and a run that does not notice."""

import json
import shutil

import numpy as np
import pytest
import torch
from small_run import equal, flags, run_here, weights
from toy_runs import SETTINGS, WORLD, prepared, respond, write_corpus, write_thinker

import train
from rmt.config.config import parse
from rmt.curriculum import TIERS
from rmt.engine.log import RunLog
from rmt.grpo import advantage_scale, advantages
from rmt.report.probe import ask_probes, describe_documents, probe_questions, probe_steps
from rmt.rewards import total_reward

CLOCK = ("time/", "speed/", "memory/")


def lines(path):
    return [json.loads(line) for line in path.read_text().strip().split("\n")]


def whole(place, out, **changes):
    """All steps of a run of its own."""
    run = prepared(place, out=str(place / out), **changes)
    with RunLog(run.out, run.config, 0, run.total_steps, WORLD) as log:
        train.run_to_end(*run, log)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("probed"), "out", steps=6, probe_times=4)


def asked(run):
    return lines(run.out / "probes.jsonl")


def test_probes_change_no_bit_of_the_training(run):
    bare = whole(run.out.parent, "bare", steps=6, probe_documents=0)
    assert equal(weights(run.out / "model"), weights(bare.out / "model"))
    assert np.array_equal(run.curriculum.drawn, bare.curriculum.drawn)
    timeless = lambda run: [
        {k: v for k, v in row.items() if not k.startswith(CLOCK)}
        for row in lines(run.out / "metrics.jsonl")
    ]
    assert timeless(run) == timeless(bare)
    assert (run.out / "samples.jsonl").read_bytes() == (bare.out / "samples.jsonl").read_bytes()
    assert not (bare.out / "probes.jsonl").exists() and not (bare.out / "documents.json").exists()


def test_probes_are_asked_at_the_first_step_in_between_and_after_the_last(run):
    assert probe_steps(run) == {0, 2, 4, 6}
    assert list(dict.fromkeys(probe["step"] for probe in asked(run))) == [0, 2, 4, 6]


def test_budget_of_a_probe_is_that_of_its_step(run):
    trained = {row["step"]: row["budget"] for row in lines(run.out / "metrics.jsonl")}
    assert all(probe["budget"] == trained.get(probe["step"], 4) for probe in asked(run))


def test_every_tier_of_a_probed_document_has_one_position_the_same_at_every_step(run):
    where = lambda step: [
        (p["document"], p["position"], p["tier"]) for p in asked(run) if p["step"] == step
    ]
    assert where(0) == where(2) == where(4) == where(6)
    documents = list(dict.fromkeys(document for document, _, _ in where(0)))
    assert documents == run.order[0][:3].tolist()
    for document in documents:
        tiers = run.tiers[document]
        own = [(position, tier) for index, position, tier in where(0) if index == document]
        assert [tier for _, tier in own] == [t for k, t in enumerate(TIERS) if (tiers == k).any()]
        assert all(TIERS[tiers[position]] == tier for position, tier in own)


def test_rewards_and_advantages_of_probes_are_those_of_training(run):
    c = run.config
    for probe in asked(run):
        said = probe["rollouts"]
        assert len(said) == c.group_size
        total = torch.tensor([[r["total"] for r in said]], dtype=torch.float64)
        scale = advantage_scale(total, c.advantage_norm, c.advantage_delta, [total])
        assert [r["advantage"] for r in said] == advantages(total, scale)[0].tolist()
        for r in said:
            worth = total_reward(r["match"], r["length_reward"], c.length_weight)
            assert r["total"] == pytest.approx(worth, abs=1e-12)
            assert r["match"] == float(r["answer"] == probe["truth"])
            assert r["thinking_length"] is None or r["thinking_length"] < r["tokens"]
    assert len({r["match"] for probe in asked(run) for r in probe["rollouts"]}) == 2


def test_random_numbers_of_probes_are_not_those_of_training(run):
    questions = probe_questions(run.config, run.data, 0)
    said = {
        purpose: respond(run, questions, 0, purpose).responses for purpose in ("train", "sample")
    }
    train, sample = ([r.tokens for group in g for r in group] for g in said.values())
    same = sum(a == b for a, b in zip(train, sample))
    assert same < len(train) / 4  # the likeliest short responses meet by chance


def test_tokens_of_a_described_document_read_as_its_text(run):
    for described in json.loads((run.out / "documents.json").read_text()):
        document = run.documents[described["index"]]
        assert "".join(described["tokens"]) == run.tokenizer.decode(document.tokens.tolist())
        lengths = {len(described[name]) for name in ("tokens", "entropies", "tiers")}
        assert lengths == {len(document.tokens)}
        assert described["entropies"][0] is None  # nothing precedes it


def test_half_characters_and_control_characters_are_escaped(tmp_path):
    write_thinker(tmp_path / "thinker")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "aé\u0007b\n" * 5}))
    run = prepared(tmp_path, batch_size=1, steps=2)
    (described,) = describe_documents(*run)
    assert described["tokens"][:6] == ["a", r"\xc3", r"\xa9", r"\x07", "b", "\n"]


def test_samples_name_the_document_by_its_number(run):
    for sample in lines(run.out / "samples.jsonl"):
        assert run.documents[sample["index"]].source == sample["document"]


def test_resumed_run_has_the_probes_of_one_that_was_left_alone(tmp_path):
    write_thinker(tmp_path / "thinker")
    write_corpus(tmp_path / "data.jsonl")
    out = tmp_path / "out"
    files = dict(model=tmp_path / "thinker", data=tmp_path / "data.jsonl", out=out)
    run_here(*flags(**SETTINGS | files | dict(steps=4, save_every=1, keep=9, probe_times=5)))
    names = ("probes.jsonl", "documents.json")
    before = [(out / name).read_text() for name in names]
    assert {probe["step"] for probe in lines(out / "probes.jsonl")} == {0, 1, 2, 3, 4}
    for step in (3, 4):
        shutil.rmtree(out / "checkpoints" / f"step-{step:06d}")
    run_here("--resume", out)
    assert [(out / name).read_text() for name in names] == before


def test_without_next_tokens_nothing_is_probed(tmp_path):
    run = prepared(tmp_path, task="nothing", budget=False)
    assert (
        probe_questions(run.config, run.data, 0) == []
        and ask_probes(*run) == []
        and describe_documents(*run) == []
    )


def test_documents_without_tiers_are_shown_and_not_asked(tmp_path):
    run = prepared(tmp_path)
    for tiers in run.tiers:
        tiers[:] = -1
    assert ask_probes(*run) == [] and len(describe_documents(*run)) == 3


def test_one_time_is_refused():
    with pytest.raises(SystemExit, match="--probe-times is 1: at least 2"):
        parse(["--probe-times", "1"], "", "")
