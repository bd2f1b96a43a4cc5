"""`make paper`: every command is one that the scripts take; tables say what was measured."""

import json
import statistics
from dataclasses import replace

import pytest
from job_commands import understood

from experiments import tables
from experiments.jobs import TINY, jobs
from experiments.results import Results, Value, value, verdict
from experiments.runner import JobFailed
from rmt.evaluation.summary import summarise

PARTS = ("claims", "beyond")


def spent(place, budget=18):
    """What RMT's run of a seed leaves for the jobs that are matched to it."""
    place.mkdir(parents=True)
    row = {"tokens/step": 1000.5, "tokens/dropped": 0.5, "time/step": 1.5, "budget": budget}
    row["step"] = 0
    (place / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 4)


@pytest.mark.parametrize("part", PARTS)
def test_every_command_is_understood(tmp_path, part):
    setting = replace(TINY, seeds=(0,))
    spent(tmp_path / "0/rmt")
    configs, _ = understood(jobs(setting, tmp_path, part))
    if part == "claims":
        assert configs["ntp-tokens"].max_tokens == 4004
        assert configs["ntp-minutes"].max_minutes == pytest.approx(0.1)
        assert configs["rpt"].match == "prefix" and configs["rpt"].resample_from > 0
        assert configs["rmt-after"].model == str(tmp_path / "0/rmt/model")
        assert configs["base-after"].model == setting.model


def test_rmt_is_the_same_run_in_both_parts(tmp_path):
    commands = [
        next(job.commands() for job in jobs(TINY, tmp_path, part)
             if job.out == tmp_path / "1/rmt")
        for part in PARTS
    ]  # fmt: skip
    assert commands[0] == commands[1]


def test_an_interval_has_the_spread_of_seeds_and_the_error_of_items():
    seeds = [70.0, 74.0, 78.0]
    spread = 4.303 * statistics.stdev(seeds) / 3**0.5
    assert value(seeds) == Value(74, 74 - spread, 74 + spread)
    both = value(seeds, 2.0)
    assert both.high - 74 == pytest.approx((spread**2 + (1.96 * 2) ** 2) ** 0.5)
    assert value([5.0]) == Value(5, 5, 5)


def test_a_verdict_needs_an_interval_beside_zero():
    assert verdict(Value(3, 1, 5)) == "confirmed" and verdict(Value(-3, -5, -1)) == "refuted"
    assert verdict(Value(3, -1, 7)) == "undecided" and verdict(None) == "not measured"


def test_a_difference_is_paired_by_seed_and_question(tmp_path):
    """Both swing by 20 points from seed to seed, and one is always eight points above."""
    for seed, right in enumerate((40, 50, 60)):
        for job, more in (("rmt", 8), ("rpt", 0)):
            evaluated(tmp_path / f"{seed}/{job}/text.json", right + more, 10)
    results = Results(TINY, tmp_path)
    rmt, rpt = (results.accuracy(job, "text", "average") for job in ("rmt", "rpt"))
    assert rmt.low < rpt.high, "intervals overlap"
    found = results.difference(("rmt", "text"), ("rpt", "text"), "average")
    assert found.mean == pytest.approx(8) and verdict(found) == "confirmed"
    other = results.difference(("rpt", "text"), ("rmt", "text"), "hard")
    assert other.mean == pytest.approx(-8) and verdict(other) == "refuted"
    assert results.difference(("rmt", "text"), ("base", "text"), "average") is None


def item(match, tier, length, document):
    return dict(match=match, tier=tier, document=document, position=9, entropy=1.0,
                well_formed=True, thinking_length=length, tokens=length + 5, budget=20)  # fmt: skip


def evaluated(place, right, length, tiers=("easy", "medium", "hard")):
    """An evaluation of 100 items per tier as eval.py writes it."""
    items = [item(i < right, tier, length, i) for tier in tiers for i in range(100)]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"tiers": summarise(items), "items": items}))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The tables of three made-up seeds in a page with markers: page, results and record."""
    for seed in range(3):
        for job, right, length in (("rmt", 80, 10), ("rpt", 50, 40), ("base", 79, 70)):
            evaluated(tmp_path / f"out/{seed}/{job}/text.json", right + seed, length)
            (tmp_path / f"out/{seed}/{job}/done.json").write_text('{"commands": [], "minutes": 2}')
        run = dict(commit="abc", torch="2", python="3", device="a CPU", config={})
        (tmp_path / f"out/{seed}/rmt/run.json").write_text(json.dumps(run))
    (tmp_path / "docs").mkdir()
    text = "before\n<!-- paper tiny -->\nold\n<!-- /paper tiny -->\nafter\n"
    (tmp_path / "docs/results.md").write_text(text)
    monkeypatch.chdir(tmp_path)
    page = tables.write_tables(TINY, tmp_path / "out")
    record = json.loads((tmp_path / "docs/paper-tiny.json").read_text())
    return page, (tmp_path / "docs/results.md").read_text(), record


def test_tables_tell_the_numbers_of_the_evaluations(written, tmp_path):
    page, readme, record = written
    found = Results(TINY, tmp_path / "out").accuracy("rmt", "text", "average")
    assert found.mean == pytest.approx(81) and found.low < 79 < 83 < found.high
    line = next(line for line in page.splitlines() if line.startswith("| **RMT**"))
    assert f"{found} · *59.12*" in line
    assert "than RPT: **confirmed**" in page
    assert "thinking untrained (NTR): **undecided**" in page
    assert "the budget helps: **not measured**" in page
    assert "RPT's length: **25%**" in page
    assert readme.startswith("before\n<!-- paper tiny -->\n") and readme.endswith("after\n")
    assert "old" not in readme and line in readme
    assert record["2/rmt"]["minutes"] == 2 and record["2/rmt"]["commit"] == "abc"
    assert record["2/rpt"]["tiers"]["text"][0]["accuracy"] == pytest.approx(0.52)


def test_a_failed_job_ends_the_command_with_its_reason(tmp_path, monkeypatch, capsys):
    from experiments import paper

    def fail(*_):
        raise JobFailed("why it failed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "run_all", fail)
    monkeypatch.setattr("sys.argv", ["paper"])
    with pytest.raises(SystemExit, match="why it failed"):
        paper.main()
