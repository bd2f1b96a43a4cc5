"""`make study`: every command is one that the scripts take, and verdicts say what was measured."""

import json

import pytest
from job_commands import understood

from experiments import study, verdicts
from experiments.runner import JobFailed
from experiments.verdicts import Value, difference, value
from rmt.config.config import parse


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "OUT", tmp_path)
    monkeypatch.setattr(study, "STORED", tmp_path / "study.jsonl")
    monkeypatch.setattr(study, "SEEDS", [100])
    return tmp_path


def ran(out, tokens):
    """Leave what a training run leaves: a line for each step."""
    out.mkdir(parents=True)
    lines = [{"step": n, "tokens/step": tokens, "tokens/dropped": 0} for n in range(study.STEPS)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_command_is_understood_and_is_repeated_at_rmts_tokens(place):
    for world in study.WORLDS:
        for method in study.METHODS:
            ran(place / world / method / "100", 200.0 if method == "without-budget" else 102.0)
    for job in study.jobs({}):
        _, asked = understood([study.Job(job.out, job.commands)])
        method = job.out.parts[-2]
        if method == "base":
            assert asked["100"] == ["ntr", "ntp"]
            continue
        trained = [
            parse(flags, "", "") for script, *flags in job.commands() if script == "train.py"
        ]
        for c in trained:
            assert c.seed == 100 and c.ntp == (method not in ("without-ntp", "rpt"))
            assert c.budget == (method not in study.FREE)
            assert c.curriculum == (method not in study.FREE - {"without-budget"} | {
                "without-curriculum"})  # fmt: skip
        lengths = {"without-budget": [60, 31], "ntp": [60, 100000]}  # it costs 200 / 102 as much
        assert [c.steps for c in trained] == lengths.get(method, [60])
        assert trained[-1].max_tokens == (6120 if method == "ntp" else 0)
        mode = "ntr" if method in study.FREE else "rmt"
        assert asked["100"] == [mode, "ntp"] * len(trained)


def test_a_job_is_chosen_with_those_it_needs(place):
    names = lambda jobs: ["/".join(job.out.parts[-3:]) for job in jobs]
    assert names(study.chosen({}, ["all/rpt"])) == ["all/base/100", "all/rmt/100", "all/rpt/100"]
    assert names(study.chosen({"all/rmt/100": {}}, ["all/rpt"])) == ["all/rpt/100"]
    assert len(study.chosen({}, [""])) == 5 * (1 + len(study.METHODS))


def test_what_is_stored_is_not_run_again(place):
    stored = {"none/rmt/100": {"tokens": 7}, "none/base/100": {}}
    names = {"/".join(job.out.parts[-3:]): job for job in study.jobs(stored)}
    assert not stored.keys() & names.keys()
    assert names["none/rpt/100"].needs == () and names["all/rpt/100"].needs


def test_a_finished_job_is_stored_and_read_again(place, monkeypatch):
    out = place / "none/rmt/100"
    ran(out, 100.0)
    (out / "done.json").write_text(json.dumps({"minutes": 1.234, "commands": ["python train.py"]}))
    (out / "run.json").write_text(json.dumps({"commit": "abc", "torch": "2", "device": "cpu"}))
    items = [
        {"document": d, "position": 9, "match": d == 1, "well_formed": True, "tier": "easy",
         "thinking_length": 8}
        for d in (0, 1)
    ]  # fmt: skip
    (out / "thought.json").write_text(json.dumps({"mode": "rmt", "items": items}))
    study.write_data()
    study.collect()
    (row,) = study.read_stored().values()
    assert (row["job"], row["tokens"], row["minutes"]) == ("none/rmt/100", 6000, 1.23)
    assert row["thought"]["match"] == "01" and row["thought"]["thinking"] == 8
    assert len(row["curves"]["reward/match"]) == study.STEPS
    assert study.tokens_of("none", 100) == 6000
    study.collect()
    assert len(study.read_stored()) == 1


def answered(right, samples=1):
    return {"asked": "p", "samples": samples, "match": right, "thinking": 9, "nats": 1.0}


def test_a_difference_is_paired_and_takes_each_methods_better_mode():
    base = answered("000000") | {"documents": [0, 0, 1, 1, 2, 2], "tiers": "eemmhh"}
    stored = {"none/base/100": {"thought": base}}
    for seed, rival in ((100, "110000"), (101, "111000")):
        stored[f"none/rmt/{seed}"] = {"thought": answered("111111"), "plain": answered("000000")}
        stored[f"none/ntp/{seed}"] = {
            "thought": answered("000000"), "plain": answered("000000"),
            "plain-tokens": answered(rival),
        }  # fmt: skip
    assert difference(stored, "none", "ntp", "").mean == 100
    found = difference(stored, "none", "ntp", "-tokens")
    assert found.mean == pytest.approx(100 * (4 + 3) / 12) and found.seeds == 2
    assert found.low < found.mean < found.high
    stored["none/ntp/101"]["plain-tokens"]["asked"] = "q"
    with pytest.raises(
        ValueError, match="none/ntp/101, or RMT of that seed, answers other questions"
    ):
        difference(stored, "none", "ntp", "-tokens")
    assert difference(stored, "none", "rpt", "") is None


def test_an_interval_has_the_spread_of_seeds_and_the_error_of_questions():
    found = value([70.0, 74.0, 78.0], 2.0)
    off = ((4.303 * 4 / 3**0.5) ** 2 + (1.96 * 2) ** 2) ** 0.5
    assert (found.mean, found.spread) == (74, 4) and found.high - 74 == pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize(
    "found, said",
    [
        (Value(5, 1, 9, 3), "confirmed"),
        (Value(5, 1, 9, 2), "2 seeds"),
        (Value(-5, -9, -1, 3), "refuted"),
        (Value(0.5, -2, 3, 3), "equal"),
        (Value(5, -1, 11, 3, 9.0), "undecided, ~26 seeds"),
        (Value(1, -4, 6, 3, 2.0), "undecided, ~4 seeds"),
        (Value(1, -4, 6, 9, 2.0, 1.5), "undecided, more questions"),
    ],
)
def test_a_verdict(found, said):
    assert found.verdict == said


def test_the_page_is_written_from_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "PAGE", tmp_path / "study.md")
    base = answered("080000", 8) | {
        "documents": [0, 0, 1, 1, 2, 2], "tiers": "eemmhh", "correlation": 0.01,
    }  # fmt: skip
    about = {"commit": "abc", "torch": "2", "device": "cpu", "minutes": 60, "tokens": 2e6}
    stored = {
        "all/base/100": {"thought": base, "plain": answered("000000"), "minutes": 1,
                         "coins": {"same": 1.0, "changed": 0.25}},
        "all/rmt/100": {"thought": answered("111110"), "plain": answered("000000")} | about,
        "all/rpt/100": {"thought": answered("111111"), "thought-tokens": answered("000000"),
                        "plain": answered("000000")} | about,
    }  # fmt: skip
    page = verdicts.write_page(stored)
    assert page == (tmp_path / "study.md").read_text("utf-8")
    assert "| all | 9 | +0.01 | 50.0 | 0.0 | 0.0 | 100 | 100 | 25 |" in page
    assert "| rpt | RMT's tokens | 1 | 0.0 | 0.0 | 0.0 | 0.0 (0.0–0.0) |" in page
    assert "**1 seed** -16.7" in page and "× 1 tokens" in page
    assert "commits abc" in page and "2.0 hours" in page


def test_a_failed_job_ends_the_command_with_its_reason(place, monkeypatch):
    def fail(*_):
        raise JobFailed("why it failed")

    monkeypatch.setattr(study, "run_all", fail)
    monkeypatch.setattr("sys.argv", ["study"])
    with pytest.raises(SystemExit, match="why it failed"):
        study.main()
