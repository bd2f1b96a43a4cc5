"""The report of a run: what it is made from and what it says."""

import json
import re
import shutil

import pytest
from report_runs import HOSTILE, finished_run
from small_run import flags, refusal, run_here
from toy_runs import SETTINGS

from rmt.curriculum import TIERS, tier_probabilities
from rmt.evaluation import compare
from rmt.report import report


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


def embedded(html):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(data)


def evaluation(low, right=0):
    """A report of eval.py, as far as it is read: 200 items of a tier, the first of them right."""
    row = dict(n=200, accuracy=low + 0.05, low=low, high=low + 0.1, thinking_length=low * 100)
    tiers = ("easy", "medium", "hard", "average")
    items = [dict(document=k, position=9, tier=tier, match=k < right)
             for tier in TIERS for k in range(200)]  # fmt: skip
    return json.dumps({"tiers": [dict(tier=tier, **row) for tier in tiers], "items": items})


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy")


def test_a_run_leaves_a_page(out):
    data = embedded((out / "report.html").read_text())
    (run,) = data["runs"]
    assert len(run["series"]["reward/mean"]) == 6 and len(run["samples"]) == 24
    assert {probe["step"] for probe in run["probes"]} == {0, 3, 6} and len(run["documents"]) == 3
    assert [step for step, _ in run["series"]["held-out/easy"]] == [0, 3, 6]


def test_a_page_that_cannot_be_written_does_not_fail_the_run(out, capsys):
    again = out.parent / "again"
    (again / "report.html").mkdir(parents=True)
    files = dict(model=out.parent / "thinker", data=out.parent / "data.jsonl", out=again)
    run_here(*flags(**SETTINGS | files))
    assert "no report (IsADirectoryError" in capsys.readouterr().out
    assert (again / "model" / "model.safetensors").is_file()


def test_the_page_needs_nothing_from_outside(out):
    html = report.page([out])
    markup = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    assert set(re.findall(r'(?:src|href)="([^"#]*)', markup)) <= {"", "data:,"}
    for word in ("url(", "@import", "fetch(", "XMLHttp", "import(", "innerHTML", "insertAdjacent"):
        assert word not in markup, word


def test_model_text_stays_what_it_was_and_never_ends_its_element(copy):
    samples = report.read_lines(copy / "samples.jsonl")
    samples[0]["response"] = HOSTILE
    (copy / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    html = report.page([copy])
    assert html.count("</script>") == report.page([copy.parent / "none"]).count("</script>") == 2
    assert embedded(html)["runs"][0]["samples"][0]["response"] == HOSTILE


def test_planned_tiers_are_the_curriculum_of_the_run(out):
    c = json.loads((out / "run.json").read_text())["config"]
    knobs = [c[f"curriculum_{name}"] for name in ("early", "late", "start", "end")]
    series = report.series_of(out)
    for step in range(6):
        expected = tier_probabilities(step / 6, *knobs)
        given = [series[f"planned/{tier}"][step] for tier in ("easy", "medium", "hard")]
        assert given == [(step, pytest.approx(p, abs=1e-4)) for p in expected]


def test_what_is_missing_or_cut_short_is_left_out(copy):
    for name in ("samples.jsonl", "documents.json", "probes.jsonl", "run.json", "eval.jsonl"):
        (copy / name).unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/me')
    (run,) = embedded(report.page([copy]))["runs"]
    assert len(run["series"]["reward/mean"]) == 6 and "planned/easy" not in run["series"]
    assert run["samples"] == run["documents"] == run["probes"] == []


def test_what_was_not_measured_is_null(copy):
    rows = [dict(tier="easy", n=0, accuracy=float("nan"), thinking_length=float("nan"))]
    (copy / "before.json").write_text(json.dumps({"tiers": rows}))
    html = report.page([copy])
    assert "NaN" not in json.dumps(embedded(html))
    assert report.comparison(copy).splitlines()[-1].count("–") == 5


def test_command_prints_table_verdicts_and_files(copy, capsys):
    (copy / "before.json").write_text(evaluation(0.2, 100))
    (copy / "after.json").write_text(evaluation(0.4, 118))
    report.main([str(copy)])
    printed = capsys.readouterr().out
    assert "| with thinking, after RMT | 45.0 (40.0–50.0) |" in printed
    assert "hard: up, +9.0 (" in printed and ", p = 7.6e-06" in printed
    for name in ("report.html", "curves.png", "metrics.jsonl"):
        assert f"  {copy / name}\n" in printed


DAMAGED = {
    "null": lambda report: None,
    "length-of-words": lambda report: report["tiers"][3].update(thinking_length="long") or report,
    "no-rows": lambda report: report | {"tiers": 3},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_evaluation_is_named(copy, capsys, damage):
    (copy / "before.json").write_text(evaluation(0.2))
    (copy / "after.json").write_text(json.dumps(damage(json.loads(evaluation(0.4)))))
    refusal(report, [copy], (copy / "after.json", "mend it or move it away"), capsys)


@pytest.mark.parametrize(
    "change", [{"match": None}, {"match": 0.5}, {"document": [1]}, {"tier": "esay"}]
)
def test_an_answer_that_cannot_be_compared_is_named(copy, capsys, change):
    (copy / "before.json").write_text(evaluation(0.2, 100))
    broken = json.loads(evaluation(0.4, 118))
    broken["items"][7] |= change
    (copy / "after.json").write_text(json.dumps(broken))
    names = copy / "before.json", copy / "after.json"
    refusal(compare, names, (f"{names[1]} is no report of eval.py",), capsys)
    report.main([str(copy)])
    assert f"cannot be compared: {names[1]} is no report" in capsys.readouterr().out


def test_infinity_in_a_record_leaves_the_page_whole(copy):
    with (copy / "samples.jsonl").open("a") as file:
        file.write('{"step": 9, "reward": {"total": 1e999}}\n')
    assert embedded(report.page([copy]))["runs"][0]["samples"][-1]["reward"]["total"] is None


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"usage: python -m rmt\.report RUN"):
        report.main([str(tmp_path)])
