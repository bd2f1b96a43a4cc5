"""`make real`: every command is one that the scripts take, and the table says what was measured."""

import json

import pytest
from job_commands import understood

from experiments import real
from rmt.evaluation.summary import summarise
from rmt.system.records import write_json


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "OUT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("study", [False, True])
def test_every_command_is_understood(place, study):
    row = {"tokens/step": 1000.5, "tokens/dropped": 0.5, "step": 0}
    for seed in real.SEEDS:
        (place / f"{seed}-rmt").mkdir()
        (place / f"{seed}-rmt/metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    configs, asked = understood(real.jobs(study))
    cold = configs.pop("cold")
    assert (cold.traces, cold.group_size, cold.text_in) == ("own", 1, "thought")
    assert all(c.model == str(place / "cold/model") for c in configs.values())
    assert all(c.text_in == "thought" and c.holdout == 200 for c in configs.values())
    assert {modes[0] for modes in asked.values()} == {"ntp"}
    if not study:
        assert configs.keys() == {"rmt"} and configs["rmt"].method == "rmt"
        assert all(modes[:3] == ["ntp", "rmt", "rmt"] for modes in asked.values())
        return
    assert configs.keys() == {f"{s}-{name}" for s in real.SEEDS for name in real.METHODS}
    for name, c in configs.items():
        assert c.seed == int(name[0])
        assert c.max_tokens == (0 if name.endswith("rmt") else 4004)
        # Budget and curriculum reach their ends at T: with another T they would stay at the start.
        free = not (c.budget or c.curriculum)
        free |= bool(c.traces) and c.curriculum_early == c.curriculum_late
        assert free or c.steps == configs["0-rmt"].steps
    assert configs["1-rpt"].match == "prefix" and asked["1-rpt"][1] == "ntr"
    assert configs["0-sft"].traces == "own" and asked["0-sft"][1] == "rmt"
    assert configs["0-ntp"].task == "nothing"


def test_the_table_tells_what_was_measured(place):
    def item(number, sample, match, thought=10):
        return dict(
            document=number, position=5, tier=("easy", "medium", "hard")[number % 3], target=1,
            entropy=1.0, match=match, well_formed=True, budget=12, thinking_length=thought,
            tokens=20, cut_off=False, sample=sample, answer="yes" if match else f"no{sample}",
            prefix_match=match, kind="plain",
        )  # fmt: skip

    for name, right in (("base", 0), ("cold", 3), ("rmt", 8)):
        items = {
            "plain": [item(n, 0, n % 2 == 0) for n in range(30)],
            "thought": [item(n, s, s < right) for n in range(30) for s in range(8)],
        }
        if name == "base":  # closes no thought
            for answer in items["thought"]:
                answer |= dict(thinking_length=None, well_formed=False, answer=None)
        (place / name).mkdir()
        for kind, answers in items.items():
            report = dict(tiers=summarise(answers), items=answers, nats_per_token=2.25)
            write_json(place / name / f"{kind}.json", report)  # nan is null there
        (place / name / "done.json").write_text(json.dumps({"minutes": 61.4}))
    lines = real.table().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:5]]
    assert [row[0] for row in cells] == ["base", "cold", "rmt"]
    assert [row[2] for row in cells] == ["0.0%", "37.5%", "100.0%"]
    assert [row[3] for row in cells] == ["0.0%", "100.0%", "100.0%"]  # wrong answers all differ
    assert cells[0][1:2] + cells[0][4:8] == ["50.0%", "2.2500", "–", "–", "0.0%"]
    assert cells[1][5:8] == ["10.0", "0.17", "100.0%"]
    assert cells[0][-1] == "61"
    assert "cold to rmt: up, +62.5" in lines[-1]
