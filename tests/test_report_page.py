"""The report in a browser: it opens at once, clicks through, fits, and complains about nothing."""

import json
import re
import shutil

import pytest
from browser import Browser, executable
from report_runs import HOSTILE, finished_run

from rmt.report import report

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def large(out, tmp_path_factory):
    """The files of the tiny run, repeated to 300 steps and 1,000 samples of 200 words."""
    place = shutil.copytree(out, tmp_path_factory.mktemp("large") / "run")
    for name, count, per_step in (("metrics.jsonl", 300, 1), ("samples.jsonl", 1000, 4)):
        rows = report.read_lines(out / name)
        more = [rows[i % len(rows)] | {"step": i // per_step} for i in range(count)]
        more = [row | {"response": "and so on " * 200} if per_step > 1 else row for row in more]
        (place / name).write_text("\n".join(map(json.dumps, more)))
    return place


@pytest.fixture
def opened(browser, large):
    """Opens the page of the large run and returns the browser, which must not complain."""
    path = report.write_page([large])

    def open_page(**how):
        browser.errors.clear()
        browser.open(path, **how)
        return browser

    yield open_page
    assert browser.errors == []


CHOSEN = "document.querySelector('.reader [aria-pressed=true]').dataset.position"


def test_300_steps_and_1000_samples_are_ready_within_two_seconds(opened):
    page = opened()
    assert int(page.evaluate("document.documentElement.dataset.ready")) < 2000
    assert page.evaluate("document.querySelectorAll('.panel').length") == 9


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_width_or_colour_scheme_scrolls_sideways(opened, width, scheme):
    page = opened(width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    bright = [int(x) > 128 for x in re.findall(r"\d+", paper)[:3]]
    assert bright == [scheme == "light"] * 3
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    page.click("#theme")


def test_a_probed_position_shows_its_rollouts_and_a_step_can_be_chosen(opened, large):
    page = opened()
    position = int(page.evaluate("document.querySelector('button.probed').dataset.position"))
    page.click("button.probed")
    assert page.evaluate("document.querySelectorAll('.column').length") == 3
    assert int(page.evaluate(CHOSEN)) == position
    probes = [p for p in report.read_lines(large / "probes.jsonl") if p["position"] == position]
    document = json.loads((large / "documents.json").read_text())[0]["index"]
    probes = {p["step"]: p["rollouts"] for p in probes if p["document"] == document}
    thoughts = "[...document.querySelectorAll('.rollout .thought')].map((x) => x.textContent)"
    for step in (6, 0, 3):
        page.click(f".column[data-step='{step}']")
        shown = page.evaluate(thoughts)
        expected = [r["thought"].strip().removeprefix("<think>").strip() for r in probes[step]]
        assert shown == [thought or "(no thought)" for thought in expected]


def test_a_probed_position_opens_from_the_keyboard(opened):
    page = opened()
    page.evaluate("document.querySelector('button.probed[aria-pressed=false]').focus()")
    position = page.evaluate("document.activeElement.dataset.position")
    assert page.evaluate(CHOSEN) != position
    page.press("Enter", "\r")
    assert page.evaluate(CHOSEN) == position


def test_pointing_at_a_panel_reads_a_step_and_its_names_hide_lines(opened, large):
    page = opened()
    page.evaluate("document.querySelector('.panel svg').focus()")
    page.press("ArrowLeft")
    assert page.evaluate("document.querySelector('.where').textContent") == "step 298"
    value = report.series_of(large)["match/easy"]
    last = [v for step, v in value if step <= 298][-1]
    assert page.evaluate("document.querySelector('.legend .value').textContent") == f"{last:.3g}"
    lines = "document.querySelectorAll('.panel path.line').length"
    before = page.evaluate(lines)
    page.click(".legend button")
    assert page.evaluate(lines) == before - 1


def test_samples_are_filtered_and_drawn_as_far_as_they_are_seen(opened, large):
    page = opened()
    items = "document.querySelectorAll('#samples details').length"
    assert page.evaluate(items) < 200
    page.evaluate("""(() => {
        const [tier, answer] = document.querySelectorAll('.filter select');
        tier.value = 'hard'; answer.value = 'right';
        tier.dispatchEvent(new Event('input', {bubbles: true}));
    })()""")
    samples = report.read_lines(large / "samples.jsonl")
    wanted = sum(s["tier"] == "hard" and s["reward"]["match"] > 0 for s in samples)
    said = page.evaluate("document.querySelector('#samples .hint').textContent")
    assert said == f"{wanted:,} of 1,000 samples"


def test_model_text_never_becomes_markup(browser, copy):
    samples = report.read_lines(copy / "samples.jsonl")
    hostile = dict.fromkeys(("response", "context", "truth", "answer"), HOSTILE)
    samples = [sample | hostile for sample in samples]
    (copy / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    browser.errors.clear()
    browser.open(report.write_page([copy]))
    browser.click("#samples details summary")
    browser.wait("document.querySelector('#samples details .thought') !== null")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert "markup" not in browser.evaluate("document.title") and browser.errors == []


def test_several_runs_share_the_panels(browser, out, copy):
    browser.errors.clear()
    browser.open(report.write_page([copy, out]), width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    lines = "document.querySelector('.panel').querySelectorAll('path.line').length"
    both = browser.evaluate(lines)
    browser.click("#curves .choices button")
    assert browser.evaluate(lines) == both // 2 and browser.errors == []
