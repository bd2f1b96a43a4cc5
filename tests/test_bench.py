"""The side-by-side benchmarks: who plays when, who is left out and why, and that each one runs."""

import json
import math
import sys

import pytest
import torch

from benchmarks import (
    bench,
    contest,
    forest,
    machine,
    memory_check,
    plots,
    rl_step,
    rollout,
    scaling,
)
from benchmarks.profiling import kind, matrix_share, report
from benchmarks.results import ratios, spread

MODULE = "toy_contenders"
NUMBERS = {"times", "median", "low", "high", "tokens_per_second", "peak_bytes"}


TOY = '''
import argparse, time
from pathlib import Path
from benchmarks import contest

def toy(o, turns):
    """Writes down when it worked; `broken` raises in its second turn."""
    if o.contender == "absent":
        raise contest.Unavailable("needs what is not here")
    turns.actions["number"] = lambda: {"number": 1 if o.contender == "ours" else o.number}
    count = 0
    while turns.begin():
        print("this is no answer")
        count += 1
        started = time.time()
        time.sleep(0.02)
        with open(o.log, "a") as log:
            log.write(f"{o.contender} {started} {time.time()}\\n")
        if o.contender == "broken" and count == 2:
            raise ValueError("out of luck")
        turns.end(tokens=10, place=count)

parser = argparse.ArgumentParser()
parser.add_argument("--contender")
parser.add_argument("--log", type=Path)
parser.add_argument("--number", type=int)
parser.add_argument("--threads", type=int)
contest.take_part(toy, parser.parse_args())
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the toy contenders are found and leave their log."""
    (tmp_path / "toy_contenders.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def compare(ours, peer):
    return {"agrees": ours.ask("number") == peer.ask("number")}


def toy_contest(place, names, number=1, **settings):
    log = place / "log.txt"
    flags = ["--log", str(log), "--number", str(number), "--threads", "1"]
    rows = contest.hold(MODULE, names, flags, rounds=3, check=compare, **settings)
    return rows, [line.split() for line in log.read_text().splitlines()]


def test_contenders_work_in_turns_and_one_at_a_time(place):
    names = ["ours", "broken", "peer", "absent", "gone"]
    rows, log = toy_contest(place, names, absent={"gone": "not installed"})
    first, later = ["ours", "broken", "peer"], ["ours", "peer"]
    assert [name for name, *_ in log] == [*first, *first, *later, *later]
    ends = [float(end) for *_, end in log]
    starts = [float(start) for _, start, _ in log]
    assert all(start >= end for start, end in zip(starts[1:], ends))
    ours, broken, peer, absent, gone = rows
    assert broken["reason"].startswith("failed (exit status 1)")
    assert "out of luck" in broken["reason"] and gone["reason"] == "not installed"
    assert absent["reason"] == "needs what is not here"
    for row in (ours, peer):
        assert len(row["times"]) == 3 and 0.02 <= row["low"] <= row["median"]
        assert row["tokens"] == 10 and row["place"] == 3  # the median of turns 2, 3 and 4
        assert row["threads"] == 1 and row["peak_bytes"] > 50e6
    found = ratios(rows)
    assert found["peer"] == "peer" and list(found["each"]) == ["peer"]
    assert found["ratio_time"] == ours["median"] / peer["median"]
    assert not {"median", "times"} & broken.keys()


def test_who_disagrees_stops_the_contest_before_anything_is_timed(place):
    (place / "log.txt").touch()
    with pytest.raises(SystemExit, match="peer and ours disagree"):
        toy_contest(place, ["ours", "peer"], number=2)
    assert not (place / "log.txt").read_text()


def test_ours_must_run(place):
    with pytest.raises(SystemExit, match=r"ours failed: failed \(exit status 1\).*IsADirectory"):
        contest.hold(MODULE, ["ours"], ["--log", str(place), "--threads", "1"], rounds=1)


def test_ratios_are_to_the_first_peer_and_to_the_best():
    row = lambda name, seconds, peak: {
        "contender": name, "peak_bytes": peak, **spread([seconds] * 3, 8)
    }  # fmt: skip
    found = ratios([row("ours", 1, 40), {"contender": "b", "reason": "no"}, row("c", 4, 50),
                    row("d", 2, 80)])  # fmt: skip
    assert (found["peer"], found["ratio_time"], found["ratio_memory"]) == ("c", 0.25, 0.8)
    assert (found["best_peer"], found["ratio_time_best"], found["ratio_memory_best"]) == (
        "d", 0.5, 0.8,
    )  # fmt: skip


def run(monkeypatch, module, file, *flags):
    """A benchmark's main, and what it wrote."""
    monkeypatch.setattr(
        sys, "argv", [module.__name__, "--threads", "1", "--json", str(file), *flags]
    )
    module.main()
    found = json.loads(file.read_text())
    assert {"command", "versions", "device", "commit"} <= found.keys()
    assert found["versions"]["torch"] and found["command"].startswith("python -m benchmarks.")
    if plots.drawn(file):
        assert file.with_suffix(".png").stat().st_size > 1000
    return found


SMALL = ["--model", "tiny", "--documents", "2", "--group", "2", "--prefix", "16", "--response", "4"]


def test_rollout_agrees_with_transformers_and_reports_everybody(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "known", lambda *_: {"flops": 1e12, "bytes": 1e11})
    found = run(
        monkeypatch, rollout, tmp_path / "rollout.json", *SMALL, "--rounds", "1", "--sequences",
        "4", "--dtypes", "float32", "--contenders", "transformers-dynamic", "vllm",
    )  # fmt: skip
    (only,) = found["contests"]
    ours, peer, absent = only["rows"]
    assert all(row.keys() >= NUMBERS for row in (ours, peer)) and absent["reason"]
    assert ours["tokens"] == peer["tokens"] == 4 * 4
    assert peer["check"]["greedy_equal"] == 1 and peer["check"]["logprob_max"] < 1e-4
    assert found["ratio_time"] == ours["median"] / peer["median"]
    assert found["ratio_memory"] == ours["peak_bytes"] / peer["peak_bytes"]
    assert 0 < ours["roofline"] < 1
    assert "vllm" in capsys.readouterr().out


def test_rl_step_measures_ours_without_its_peer(tmp_path, monkeypatch):
    flags = ["--rounds", "1", "--micro", "2", "--contenders", "ours"]
    found = run(monkeypatch, rl_step, tmp_path / "rl_step.json", *SMALL, *flags)
    (ours,) = found["contests"][0]["rows"]
    assert ours.keys() >= NUMBERS and ours["tokens"] == 2 * 2 * 4
    assert 0 < ours["rollout_seconds"] < ours["median"] and ours["training_tflops"] > 0
    assert found["ratio_time"] is None and found["contests"][0]["dtype"] == "bfloat16"


def test_forest_has_equal_gradients_and_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(forest, "SWEEPS", {"prefix": (4, 8), "branches": (1, 2), "response": (4,)})
    found = run(
        monkeypatch, forest, tmp_path / "forest.json", "--model", "tiny", "--prefix", "8",
        "--branches", "2", "--response", "4", "--rounds", "2", "--sweep-rounds", "1",
        "--sweep-layers", "1",
    )  # fmt: skip
    half, single = found["contests"]
    assert (half["dtype"], single["dtype"]) == ("bfloat16", "float32")
    assert single["gradient_difference"] < 1e-5 and single["layers"] == 4
    assert [row["contender"] for row in single["rows"]] == ["packed", "independent"]
    assert all(row.keys() >= NUMBERS and len(row["times"]) == 2 for row in single["rows"])
    assert found["ratio_time"] == half["ratio_time"] > 0
    assert len(found["sweep"]) == 3 and {point["layers"] for point in found["sweep"]} == {1}


def test_scaling_shares_the_trunk_and_fits_lines(tmp_path, monkeypatch):
    sweeps = {"documents": (1, 2), "positions": (1, 2), "group": (2, 6), "length": (4, 8)}
    monkeypatch.setattr(scaling, "SWEEPS", sweeps)
    found = run(
        monkeypatch, scaling, tmp_path / "scaling.json", "--model", "tiny", "--layers", "1",
        "--documents", "1", "--positions", "1", "--group", "2", "--prefix", "16", "--length", "4",
        "--rounds", "1",
    )  # fmt: skip
    row = found["summary"]["group"]
    assert row["values"] == [2, 6] and row["tokens"] == [8, 24]
    assert row["prefill_rows"] == [15, 15] and row["shared_rows"] == [16, 16]
    assert found["summary"]["documents"]["shared_rows"] == [16, 32]
    assert all(math.isfinite(fit["r2"]) for fit in row["fit"].values())
    assert all(point["peak_bytes"] > 0 for point in found["points"])


def test_the_table_has_a_line_for_each_peer_and_says_who_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "OUT", tmp_path)
    numbers = {"peak_bytes": 2, **spread([1.0, 2.0, 3.0], 8)}
    rows = [{"contender": "ours", **numbers}, {"contender": "trl", "reason": "not installed"},
            {"contender": "other", **numbers}]  # fmt: skip
    about = dict(documents=4, group=8, response=64, prefix=256, dtype="bfloat16")
    contests = [{**about, **ratios(rows), "rows": rows}]
    (tmp_path / "rl_step.json").write_text(json.dumps({"contests": contests}))
    said = bench.table(["rl_step", "forest"], {"forest": "not begun: the time was over"})
    assert "trl: not installed" in said and "not begun: the time was over" in said
    assert "2.00 (1.00–3.00)" in said and " 1.00 " in said


def test_a_profile_tells_products_from_the_rest():
    square = torch.randn(400, 400)

    def sample(tokens):
        for _ in range(tokens):
            (square @ square).exp()

    found = matrix_share(sample, 30)
    assert found["steps"] == 29 and 0 < found["outside_operators"] < 0.6
    assert {"aten::mm", "aten::exp"} <= {name for name, _ in found["costliest"]}
    assert "29 decode steps" in report(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("aten::addmm", "product"), ("mkldnn::_linear_pointwise", "product"), ("aten::add", "rest"),
     ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::bmm", "product"),
     ("aten::softmax", "rest"), ("aten::addcmul_", "rest"), ("parts", "attention"),
     ("merge", "attention")],
)  # fmt: skip
def test_operators_are_told_apart(name, expected):
    assert kind(name) == expected


@pytest.mark.slow
def test_memory_check_has_what_was_planned_and_what_a_run_measured(tmp_path, monkeypatch):
    words = ["--models", "tiny", "--document-tokens", "64", "--response", "16"]
    monkeypatch.setattr(sys, "argv", ["memory_check", *words, "--json", str(tmp_path / "m.json")])
    memory_check.main()
    (found,) = json.loads((tmp_path / "m.json").read_text())["models"]
    assert found["measured"] > 0 and found["planned"].keys() == {"rollout", "update"}
    assert found["off"] == max(found["planned"].values()) / found["measured"] - 1


def test_what_takes_no_memory_that_can_be_seen_divides_no_ratio_by_zero():
    peak = machine.peak_memory(lambda: None, torch.device("cpu"))
    assert peak is None or peak >= machine.PAGE
