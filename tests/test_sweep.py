"""A grid of runs: what is run, what is not run again, and what the table says."""

import json

import pytest
from toy_runs import SETTINGS, write_corpus, write_thinker

from experiments import sweep
from experiments.runner import Job, JobFailed, run_all

GRID = ["--vary", "ntp-weight=0.1,1", "--vary", "length_weight=0.2", "--seeds", "0", "1"]


def flags_of(place) -> list[str]:
    write_thinker(place / "thinker")
    write_corpus(place / "data.jsonl")
    chosen = SETTINGS | dict(model=place / "thinker", data=place / "data.jsonl", steps=2)
    words = ["--out", str(place / "sweep")]
    for name, value in chosen.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [sweep.flag(name), *map(str, values)]
    return words


@pytest.mark.slow
def test_a_sweep_runs_every_point_once_and_tells_their_means(tmp_path, capsys):
    flags = flags_of(tmp_path)
    sweep.main([*GRID, *flags])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + 2
    record = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [(r["ntp_weight"], r["length_weight"], len(r["runs"])) for r in record] == [
        ("0.1", "0.2", 2),
        ("1", "0.2", 2),
    ]
    run = json.loads((tmp_path / "sweep/ntp_weight=1_length_weight=0.2/1/run.json").read_text())
    config = run["config"]
    assert (config["ntp_weight"], config["length_weight"], config["seed"]) == (1, 0.2, 1)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").rglob("metrics.jsonl")}
    sweep.main([*GRID, *flags])
    assert {p: p.stat().st_mtime_ns for p in times} == times


@pytest.mark.parametrize(
    "words, said",
    [
        (["--vary", "no-such-knob=1"], "no-such-knob=1"), (["--vary", "seed="], "seed="),
        (["--vary", "ntp-weight=1", "--ntp-weight", "2"], "--ntp-weight is varied"),
        (["--vary", "ntp-weight=1", "--seed", "2"], "--seed is varied"),
    ],
)  # fmt: skip
def test_a_grid_that_makes_no_sense_is_refused(words, said):
    with pytest.raises(SystemExit) as error:
        sweep.main(words)
    assert said in str(error.value)


def test_lists_and_switches_are_values_too(tmp_path):
    words = ["--vary", "tier-thresholds=0.5/1/1.5", "--vary", "curriculum=True,False"]
    options, knobs, rest = sweep.read_arguments([*words, "--out", str(tmp_path), "--steps", "3"])
    commands = [job.commands()[0] for (job,) in sweep.jobs_of(options, knobs, rest).values()]
    for command, switch in zip(commands, ("--curriculum", "--no-curriculum")):
        assert " ".join(command).startswith("train.py --steps 3 --tier-thresholds 0.5 1 1.5")
        assert switch in command


def test_points_that_answer_the_same_questions_are_compared_in_pairs():
    def runs(right):
        items = lambda seed: [dict(document=k, position=9, tier="easy", seed=seed, match=k < right)
                              for k in range(60)]  # fmt: skip
        return [{"items": items(seed), "accuracy": right / 60} for seed in (0, 1)]

    found = {("0",): runs(30), ("1",): runs(40), ("2",): runs(31)}
    found |= {("3",): [{**run, "items": run["items"][1:]} for run in runs(40)]}
    for results in found.values():
        for run in results:
            run |= dict.fromkeys(sweep.COLUMNS)
    cells = [line.split(" | ")[2] for line in sweep.table({"seed": []}, found).splitlines()[2:]]
    assert cells[0] == cells[3] == "–", "the first, and one that was asked others"
    assert cells[1].startswith("up, +16.7 (") and cells[1].endswith("p = 1.9e-06")
    assert cells[2].startswith("no clear difference, +1.7 (")


def script(place, name, text) -> Job:
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.py").write_text(text)
    return Job(place / name, lambda: [(str(place / f"{name}.py"), str(place / name))])


def test_a_job_begins_after_those_it_needs_and_flags_may_follow_from_them(tmp_path):
    first = script(tmp_path, "first", "import sys; open(sys.argv[1] + '/made', 'w').write('7')")
    read = lambda: [("-c", f"assert {(first.out / 'made').read_text()} == 7")]
    (tmp_path / "second/checkpoints").mkdir(parents=True)
    run_all([first, Job(tmp_path / "second", read, needs=(first.out,))], workers=2)
    assert not (tmp_path / "second/checkpoints").exists(), "complete: it keeps no checkpoints"
    assert json.loads((tmp_path / "second/done.json").read_text())["minutes"] >= 0


def test_a_failed_job_is_named_with_its_log_and_tried_again_the_next_time(tmp_path):
    failing = script(tmp_path, "failing", "import sys; print('why'); sys.exit(3)")
    with pytest.raises(JobFailed, match=r"status 3; .*log.txt says why"):
        run_all([failing], workers=1)
    assert "why" in (failing.out / "log.txt").read_text()
    assert not (failing.out / "done.json").exists()
    (tmp_path / "failing.py").write_text("")
    run_all([failing], workers=1)
    assert (failing.out / "done.json").exists()
