"""`make study`: every command is one that the scripts take, and verdicts say what was measured."""

import itertools
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from job_commands import understood
from toy_runs import prepared, stepped

import train
from experiments import shares, study, study_page
from experiments import stored as storing
from experiments.designs import DESIGNS, HAZARD, SCREEN, effects
from experiments.links import ROOT
from experiments.runner import Job, JobFailed, run_all
from experiments.study import Study
from experiments.verdicts import (
    BEYOND,
    CLAIMS,
    Value,
    answers,
    difference,
    rate,
    seeds_of,
    student,
    value,
)
from rmt.config.config import parse
from rmt.system import env
from rmt.update import update


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SEEDS", [100])
    return Study(tmp_path, tmp_path / "study.jsonl")


def ran(out, tokens):
    """Leave what a training run leaves: a line for each step."""
    out.mkdir(parents=True)
    line = {"tokens/step": tokens, "tokens/dropped": 0, "time/step": 1.2}
    lines = [line | {"step": n} for n in range(60)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def names(jobs):
    return ["/".join(job.out.parts[-3:]) for job in jobs]


def trained_by(job):
    return [parse(flags, "", "") for script, *flags in job.commands() if script == "train.py"]


def test_every_command_is_understood_and_a_rival_is_repeated_at_rmts_tokens(place):
    without_text = {"rpt", "rlp"}
    free = {"without-budget", "rft", "ntp", "big-batch"} | without_text  # told no length
    cost = {"without-budget": 200.0, "ntp": 51.0}  # of a step
    for world, method, seed in study.cells():
        if method != "base":
            out = place.out / world / method / str(seed)
            ran(out, cost.get(method, 102.0))
            if method in cost:  # at RMT's tokens; without a budget only at the second try
                ran(out / "equal-tokens", 51.0 if method == "without-budget" else 102.0)
                ran(out / "equal-tokens-2", 102.0)
    for job in place.jobs():
        world, method, _ = job.out.parts[-3:]
        if method == "shares":
            ((_, module, *flags),) = job.commands()
            assert module == shares.__name__ and parse(flags, "", "").out == str(job.out)
            continue
        _, asked = understood([Job(job.out, job.commands)])
        if method == "base":
            assert asked["100"] == ["ntr", "ntp"]
            continue
        trained = trained_by(job)
        if method.startswith("post"):
            assert [c.steps for c in trained[:-1]] == {"post-rmt": [60], "post-ntp": [120]}.get(
                method, [])  # fmt: skip
            last = trained[-1]
            assert (last.method, last.match, last.steps) == ("rpt", "token", 120)
            assert last.model.endswith(f"{method[5:]}/model" if trained[1:] else "worlds/plain")
            continue
        if method.startswith("longer"):  # then next-token training at half of the cost of a step
            steps = int(method.removeprefix("longer-"))
            assert [(c.method, c.steps) for c in trained] == [("rmt", steps), ("ntp", 120)]
            assert asked["100"] == ["rmt", "ntp"] * 2
            continue
        for c in trained:
            assert c.seed == 100 and c.ntp == (method not in without_text | {"without-ntp"})
            assert c.batch_size == (24 if method == "big-batch" else 12)  # 102 / 51 as many tokens
            assert c.lr_schedule == "linear"
            assert c.learning_rate == 3e-4
            assert c.budget == (method not in free)
            assert c.curriculum == (method not in free - {"without-budget"} | {
                "without-curriculum"})  # fmt: skip
        full = {"none": 15, "unequal-entropy": 15}.get(world, 60)
        once = round(0.51 * full)
        again = {"without-budget": [once, 2 * once], "ntp": [2 * full]}.get(method, [])
        assert [c.steps for c in trained] == [full, *again]
        assert {Path(path).stem for c in trained for path in c.data} == {
            "long" if method in ("ntp", "big-batch") else "train"}  # fmt: skip
        assert asked["100"] == ["rmt", "ntp"] * (2 if again else 1)


def test_a_job_is_chosen_with_those_it_needs(place):
    assert names(place.chosen(["all/rpt"])) == ["all/base/100", "all/rmt/100", "all/rpt/100"]
    assert names(place.chosen(["unequal-entropy/screen-00"]))[0] == "unequal-entropy/base/100"
    assert names(place.chosen(["all/big"])) == [
        "all/base/100", "all/rmt/100", "all/ntp/100", "all/big-batch/100"
    ]  # fmt: skip
    command = " ".join(["python", *study.TRAIN, "--steps 60 --seed 100"])
    row = {"job": "all/rmt/100", "tokens": 1, "commands": [command]}
    storing.write(place.file, {"all/rmt/100": row})
    assert names(place.chosen(["all/rpt"])) == ["all/rpt/100"]
    row["commands"] = [command.replace("60", "15")]
    storing.write(place.file, {"all/rmt/100": row})
    with pytest.raises(ValueError, match="all/rmt/100 is stored and ran without `--steps 60`"):
        place.chosen(["all/rpt"])


def test_worlds_are_not_run_beside_jobs_of_other_settings(place):
    row = {"job": "all/rmt/100", "tokens": 1, "commands": ["python train.py --preset demo"]}
    storing.write(place.file, {"all/rmt/100": row})
    with pytest.raises(
        ValueError, match=r"all/rmt/100 is stored and ran without .* linear.*remove"
    ):
        place.chosen(["all/rpt"])
    assert place.chosen(["none/rpt"])


def test_what_is_stored_is_not_run_again(place):
    stored = {name: {"job": name, "tokens": 7} for name in ("none/rmt/100", "none/base/100")}
    storing.write(place.file, stored)
    jobs = dict(zip(names(place.jobs()), place.jobs()))
    assert not stored.keys() & jobs.keys()
    assert jobs["none/rpt/100"].needs == () and jobs["all/rpt/100"].needs


def test_a_finished_job_is_stored_and_read_again(place):
    out = place.out / "none/rmt/100"
    ran(out, 100.0)
    ran(out / "equal-tokens", 50.0)
    ran(out / "equal-tokens-2", 90.0)
    (out / "done.json").write_text(json.dumps({"minutes": 9, "commands": ["python train.py"]}))
    (out / "run.json").write_text(json.dumps({"commit": "abc", "torch": "2", "device": "cpu"}))
    items = [
        {"document": d, "position": 9, "match": d == 1, "well_formed": True, "tier": "easy",
         "thinking_length": 8}
        for d in (0, 1)
    ]  # fmt: skip
    (out / "thought.json").write_text(json.dumps({"mode": "rmt", "items": items, "data": "d"}))
    place.write_data()
    place.collect()
    (row,) = storing.read(place.file).values()
    assert (row["job"], row["tokens"], row["minutes"]) == ("none/rmt/100", 6000, 3.6)
    assert row["tokens-tokens"] == 5400
    assert row["thought"]["match"] == "01" and row["thought"]["thinking"] == 8
    assert len(row["curves"]["reward/match"]) == 60
    assert place.tokens("none", 100) == 6000
    place.collect()
    assert len(storing.read(place.file)) == 1


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_no_two_effects_of_a_design_are_mixed(design):
    assert set(map(len, design.levels)) == {len(design.settings)}
    signs = 2 * np.array(design.levels) - 1
    columns = [*signs.T]
    if design.pairs:
        columns += [a * b for a, b in itertools.combinations(signs.T, 2)]
    assert np.array_equal(
        np.array(columns) @ np.transpose(columns), len(signs) * np.eye(len(columns))
    )
    assert not np.array(columns).sum(axis=1).any()


def test_a_setting_of_a_design_is_what_its_name_says(place):
    configs = {
        job.out.parts[-2]: trained_by(job)[0]
        for job in place.jobs() if job.out.parts[-2] in ("rmt", *study.VARIED)
    }  # fmt: skip
    for levels, name in zip(HAZARD.levels, HAZARD.runs):
        w, gate, batch, short, hard = levels
        c = configs[name]
        assert (c.length_weight, c.length_reward_gate) == (
            (0.1, 0.3)[w], ("none", "correct_only")[gate])  # fmt: skip
        assert c.advantage_norm == ("group", "batch")[batch]
        assert int(c.budget_start * c.budget_decay) == (30, 10)[short]
        assert c.curriculum_early == c.curriculum_late == ((0.5, 0.5, 0), (0, 0, 1))[hard]
    for name, cure in (("none", ("none", "keep")), ("drop", ("group", "drop"))):
        c = configs[f"hazard-{name}"]
        assert (c.advantage_norm, c.zero_variance_groups) == cure
        assert c.curriculum_late == (0, 0, 1)
        assert int(c.budget_start * c.budget_decay) == 10 and c.length_reward_gate == "none"
    values = lambda c: (
        c.length_weight, c.ntp_weight, c.curriculum_start, c.curriculum_early[0],
        c.curriculum_late[0], c.tier_thresholds[2], c.group_size,
        c.temperature, c.warmup_steps,
    )  # fmt: skip
    high = (0.3, 0.3, 0, 0.4, 0.2, 2, 4, 1, 0)
    for levels, name in zip(SCREEN.levels, SCREEN.runs):
        assert values(configs[name]) == tuple(
            h if level else low for h, low, level in zip(high, values(configs["rmt"]), levels)
        )
    assert set(CLAIMS) | set(BEYOND) == set(study.RIVALS)


def test_a_planted_effect_is_found_by_its_design():
    rng = np.random.default_rng(0)
    base = answered("0" * 400, 4) | {"documents": [k // 4 for k in range(400)], "tiers": "eh" * 200}
    stored = {"unequal-entropy/base/100": {"thought": base}}
    for levels, method in zip(HAZARD.levels, HAZARD.runs):
        for seed in (100, 101, 102):
            share = 0.5 - 0.3 * levels[3] + 0.2 * (levels[1] == levels[3])
            # Of what a run does not train nothing counts.
            own = np.arange(400) % 2 == levels[4]
            right = "".join(str(int(x)) for x in own & (rng.random(400) < share))
            row = answered(right) | {"thinking": 30 - 9 * levels[0]}
            stored[f"unequal-entropy/{method}/{seed}"] = {"thought": row}
    found = effects(stored, HAZARD)
    clear = {name for name, effect in found.items() if effect.clear}
    budget, both = (
        HAZARD.settings[3].name,
        f"{HAZARD.settings[1].name} and {HAZARD.settings[3].name}",
    )
    assert {budget, both} <= clear and len(clear) <= 4
    assert np.mean(found[budget].of_seeds) == pytest.approx(-30, abs=5)
    assert np.mean(found[both].of_seeds) == pytest.approx(20, abs=5)
    assert found["w"].tokens == pytest.approx(-9)
    one = {name: row for name, row in stored.items() if name.endswith("/100")}
    assert not any(effect.clear for effect in effects(one, HAZARD).values())


def test_the_gradients_of_both_parts_add_up_to_that_of_the_update(tmp_path, monkeypatch):
    seen = []

    def kept(c, model, optimizer, reference, trees, objective, *rest):
        part = lambda **changes: shares.gradient(model, trees, replace(objective, **changes), 4096)
        none = torch.zeros_like(objective.advantage)
        seen.append([part(), part(ntp_weight=0.0), part(advantage=none)])
        seen.append(shares.shares(model, trees, objective, 4096))
        return update(c, model, optimizer, reference, trees, objective, *rest)

    monkeypatch.setattr(train, "update", kept)
    run = prepared(tmp_path, length_weight=0.3)
    row, _ = stepped(run, 0)
    (both, rl, ntp), found = seen
    assert rl.norm() > 0 and ntp.norm() > 0
    assert torch.allclose(rl + ntp, both, atol=1e-6 * both.norm())
    assert found["norm/rl"] == pytest.approx(float(rl.norm())) and found["tokens/ntp"] > 0
    assert found["cosine"] == pytest.approx(float(rl @ ntp / rl.norm() / ntp.norm()), abs=1e-5)
    assert row["update/grad_norm"] == pytest.approx(float(both.norm()), rel=1e-4)


def test_a_written_page_does_not_make_a_commit_dirty(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a", *words], cwd=tmp_path, check=True
    )
    for path in ("docs/page.md", "README.md", "rmt/system/env.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "a")):
        git(*words)
    monkeypatch.setattr(env, "__file__", str(tmp_path / "rmt/system/env.py"))
    clean = env.commit()
    for page in ("docs/page.md", "README.md"):  # which the study writes
        (tmp_path / page).write_text("2")
    assert env.commit() == clean and len(clean) == 40
    (tmp_path / "rmt/system/env.py").write_text("2")
    assert env.commit() == clean + "-dirty"


def answered(right, samples=1):
    return {"asked": "p", "samples": samples, "match": right, "thinking": 9, "nats": 1.0,
            "well_formed": 1.0}  # fmt: skip


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
    stored["none/rmt/102"] = {"thought": answered("011111")}  # no rival's
    found = difference(stored, "none", "ntp", "-tokens")
    assert found.mean == pytest.approx(100 * (17 / 18 - 5 / 12)) and found.seeds == 2
    stored["none/ntp/101"]["plain-tokens"]["asked"] = "q"
    with pytest.raises(ValueError, match="none/ntp/101 answers other questions"):
        difference(stored, "none", "ntp", "-tokens")
    assert difference(stored, "none", "rpt", "") is None


def test_an_interval_has_the_spread_of_seeds_and_the_error_of_questions():
    ours, theirs = [70.0, 74.0, 78.0], [40.0, 45.0, 50.0, 45.0]
    found = value(ours, theirs, 2.0)
    error = (16 / 3 + 50 / 3 / 4) ** 0.5
    # Welch's degrees of freedom are 4.5 (scipy's ttest_ind with equal_var=False), t of that: 2.66.
    off = ((2.66 * error) ** 2 + (1.96 * 2) ** 2) ** 0.5
    assert (found.mean, found.seeds, found.spread**2) == pytest.approx((29, 3, 16 + 50 / 3))
    assert found.high - 29 == pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize(
    "found, said",
    [
        (Value(5, 1, 9, 3), "confirmed"),
        (Value(5, 1, 9, 2), "2 seeds"),
        (Value(-5, -9, -1, 3), "refuted"),
        (Value(0.5, -2, 3, 3), "equal"),
        (Value(5, -1, 11, 3, 9.0), "undecided, more than 20 seeds"),
        (Value(1, -4, 6, 3, 2.0), "undecided, ~13 seeds"),
        (Value(1, -4, 6, 14, 2.0), "undecided, ~15 seeds"),
    ],
)
def test_a_verdict(found, said):
    assert found.verdict == said
    assert found.brief.startswith("**") == (said in ("confirmed", "refuted") or found.seeds < 3)


def test_looking_again_finds_a_difference_that_is_not_there_in_one_of_twelve():
    drawn = np.random.default_rng(0).normal(size=(3000, 2, 8))
    found = [
        any(value(*map(list, both[:, :n])).verdict in ("confirmed", "refuted") for n in (3, 5, 8))
        for both in drawn
    ]
    assert np.mean(found) == pytest.approx(1 / 12, abs=0.02)


def test_the_pages_are_written_from_what_is_stored(tmp_path, monkeypatch):
    for path in ("experiments/study.md.in", "experiments/reviewers.md.in", "README.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text("utf-8"), "utf-8")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    base = answered("080000", 8) | {
        "documents": [0, 0, 1, 1, 2, 2], "tiers": "eemmhh", "correlation": 0.01,
    }  # fmt: skip
    about = {"commit": "abc", "torch": "2", "device": "cpu", "minutes": 60, "tokens": 2e6,
             "curves": {name: [0.5] for name in storing.CURVES}}  # fmt: skip
    untrained = {
        "thought": base, "plain": answered("000000"), "minutes": 1, "noise": 0.2,
        "coins": {"same": 1.0, "changed": 0.25}, "behind": {"0": 1.0, "16": 0.5, "32": 0.25},
    }  # fmt: skip
    stored = {
        "all/base/100": untrained,
        "unequal-entropy/base/100": untrained,
        f"unequal-entropy/{next(iter(SCREEN.runs))}/100": {"thought": answered("110000")} | about,
        "none/shares/100": about | {"steps": {
            "tokens/rl": [9] * 6, "tokens/ntp": [7] * 6, "norm/rl": [0.5] * 6,
            "norm/ntp": [0.25] * 6, "cosine": [0, 0, 0.1, 0.1, -0.2, -0.2]}},
    }  # fmt: skip
    for seed in (100, 101, 102):
        plain = about | {"plain": answered("000000")}
        stored[f"all/rmt/{seed}"] = plain | {"thought": answered("111110")}
        thoughts = {"thought": answered("111111"), "thought-tokens": answered("000000")}
        stored[f"all/rpt/{seed}"] = plain | thoughts
    study_page.write_pages(stored)
    page, reviewers, readme = (
        (tmp_path / path).read_text("utf-8")
        for path in ("docs/study.md", "docs/reviewers.md", "README.md")
    )
    assert "{{" not in page + reviewers
    assert "| all | 9 | +0.01 | 50.0 | 0.0 | 0.0 | 100 | 100 | 25 | 100, 50, 25 | 20 |" in page
    assert "| rpt | RMT's tokens | 3 | 0.0 | 0.0 | 0.0 | 0.0 (0.0, 0.0, 0.0) |" in page
    assert " -16.7 (" in page and "; thinks 9 : 9; × 1.00 tokens" in page
    assert "commits abc" in page and "8.0 hours" in page
    assert "with each seed: all 100 % (100, 100, 100)." in page
    assert "| RPT | **+83** |" in readme and readme.count("<!-- end -->") == 1
    assert "% (seeds; plainly): all 17→83 (3; 0→0)." in readme
    assert "| none | 9 / 9 / 9 | 7 / 7 / 7 | 0.50 / 0.50 / 0.50 | 0.25" in reviewers
    assert "+0.000 / +0.100 / -0.200" in reviewers
    assert "| 1 | 33.3 | 9 | 100 | 50 | 50 → 50 |" in reviewers


def test_the_readme_quotes_what_is_stored():
    rows, readme = storing.read(ROOT / "docs/study.jsonl"), (ROOT / "README.md").read_text("utf-8")
    tiers = rows["all/base/100"]["thought"]["tiers"]

    def right(method, at="", mode="thought"):
        seeds = sorted(seeds_of(rows, "all", method))
        found = (answers(rows, "all", method, seed, at, mode) for seed in seeds)
        return [rate(answer, tiers) for answer in found]

    each = [
        ", ".join(f"{x:.0f}" for x in right(*job))
        for job in (("as-printed",), ("as-printed", "-tokens"), ("rmt",))
    ]
    assert f"in *all*, seeds end at {each[0]} % right (at RMT's tokens {each[1]});" in readme
    assert f"which we recommend, at {each[2]}." in readme


def test_the_committed_pages_are_those_of_what_is_stored(tmp_path, monkeypatch):
    pages = ("docs/study.md", "docs/reviewers.md", "README.md")
    for path in ("experiments/study.md.in", "experiments/reviewers.md.in", *pages):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text("utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)
    rows = storing.read(ROOT / "docs/study.jsonl")
    study_page.write_pages(rows)
    for path in pages:
        assert (tmp_path / path).read_text("utf-8") == (ROOT / path).read_text("utf-8"), path
    commands = [command for row in rows.values() for command in row["commands"]]
    assert commands and not any(" /" in command for command in commands), "a machine's path"


def test_what_make_paper_runs_again_is_stored():
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("--again ")[2].partition("\n\n")[0]
    names = recipe.replace("\\", " ").split()
    rows = storing.read(ROOT / "docs/study.jsonl")
    assert names and all("thought" in rows[name] for name in names)
    study.require_these_settings({name: rows[name] for name in names}, study.WORLDS)


def test_what_is_run_again_is_compared(capsys):
    base = answered("0000", 1) | {"documents": [0, 0, 1, 1], "tiers": "eemh"}
    row = lambda right: {"thought": answered(right)}
    before = {"all/base/100": {"thought": base}, "all/rmt/100": row("1100")}
    assert study_page.compare_again(before, before) == ""
    assert "| all/rmt/100 | 50.0 | 50.0 |" in capsys.readouterr().out
    after = before | {"all/rmt/100": row("1110")}
    assert "more than 10 points apart: all/rmt/100" in study_page.compare_again(before, after)
    missing = study.run_again(before, ["all/rmt/100", "all/rmt/101"], 1)
    assert missing == ("error: all/rmt/101: not stored, so there is nothing to compare with")
    before["all/rmt/100"]["commands"] = ["python train.py --preset demo"]
    with pytest.raises(ValueError, match="all/rmt/100 is stored and ran without"):
        study.run_again(before, ["all/rmt/100"], 1)


def test_a_name_of_no_job_is_refused(place):
    with pytest.raises(ValueError, match="no job's name begins with al/rmt; one is none/base/100"):
        place.chosen(["all/rmt", "al/rmt"])


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (5, 2.571), (9, 2.262), (30, 2.042)])
def test_students_t(freedom, t):
    assert student(freedom) == pytest.approx(t, abs=4e-3)


@pytest.mark.parametrize("freedom", [2.3, 2.94, 4.96, 7.5])
def test_students_t_between_two_numbers_is_that_of_the_integral(freedom):
    t = student(freedom)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = lambda x: scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    x = np.linspace(-t, t, 100_001)
    inside = np.trapezoid(density(x), x) if hasattr(np, "trapezoid") else np.trapz(density(x), x)
    assert 0.95 <= inside < 0.952


def test_a_failed_job_ends_the_command_with_its_reason(tmp_path, monkeypatch):
    def fail(*_):
        raise JobFailed("why it failed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "run_all", fail)
    monkeypatch.setattr("sys.argv", ["study"])
    (tmp_path / "docs").mkdir()
    with pytest.raises(SystemExit, match="why it failed"):
        study.main()


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


def test_no_core_is_idle_while_a_job_waits_for_another(tmp_path):
    third = script(tmp_path, "third", "import sys; open(sys.argv[1] + '/made', 'w')")
    wait = f"""
import os, sys, time
for _ in range(600):
    if os.path.exists({str(third.out / "made")!r}):
        sys.exit()
    time.sleep(0.1)
sys.exit(1)
"""
    first = script(tmp_path, "first", wait)
    second = Job(tmp_path / "second", lambda: [], needs=(first.out,))
    run_all([first, second, third], workers=2)
    assert (second.out / "done.json").exists()


def test_a_failed_job_is_named_with_its_log_and_tried_again_the_next_time(tmp_path):
    failing = script(tmp_path, "failing", "import sys; print('why'); sys.exit(3)")
    with pytest.raises(JobFailed, match=r"status 3; .*log.txt says why"):
        run_all([failing], workers=1)
    assert "why" in (failing.out / "log.txt").read_text()
    assert not (failing.out / "done.json").exists()
    (tmp_path / "failing.py").write_text("")
    run_all([failing], workers=1)
    assert (failing.out / "done.json").exists()


def test_a_training_that_was_stopped_is_not_done(tmp_path, monkeypatch):
    out = tmp_path / "job"
    stopped = subprocess.CompletedProcess((), 0)  # saved, without a model
    monkeypatch.setattr("experiments.runner.subprocess.run", lambda *_, **__: stopped)
    with pytest.raises(JobFailed, match="was stopped"):
        run_all([Job(out, lambda: [["train.py", "--out", str(out)]])], workers=1)
    assert not (out / "done.json").exists()


def test_more_steps_are_compared_with_next_token_training_on_as_many_tokens():
    base = answered("0000", 1) | {"documents": [0, 0, 1, 1], "tiers": "eemh"}
    rmt = lambda right, steps: {
        "thought": answered(right), "plain": answered("0001"), "tokens": 10**6,
        "curves": {"reward/match": [0.0] * steps},
    }  # fmt: skip
    stored = {
        "all/base/100": {"thought": base},
        "all/rmt/100": rmt("1100", 60), "all/rmt/101": rmt("1000", 60),
        "all/rmt/102": rmt("1111", 60),  # without next-token training of its seed
        "all/ntp/100": {"plain": answered("0000"), "plain-tokens": answered("1000")},
        "all/ntp/101": {"plain": answered("1100")},  # within 10 % of RMT's tokens
        "all/longer-180/101": rmt("1110", 180) | {"plain-ntp": answered("0111")},
    }  # fmt: skip
    said = study_page.more_steps(stored)
    assert "thought 25–50 after 60, 75 after 180 steps" in said and "plainly 25–50, 75." in said
    assert "| 180 | 1 | 1.00 | 75.0 |" in study_page.longer_table(stored)
    assert not study_page.more_steps({})
