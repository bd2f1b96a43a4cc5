"""What the docs say of the code is so: lines, files, words."""

import re

import pytest

from experiments.links import LINK, ROOT, pages, refreshed
from models.config import ARCHITECTURES
from models.rope import SCALINGS

PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)


@PAGES
def test_links_to_lines_of_code_are_up_to_date(page):
    said = "python -m experiments.links sets the numbers"
    assert refreshed(page) == page.read_text(encoding="utf-8"), said


@PAGES
def test_what_a_page_links_to_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


def test_every_equation_has_a_line():
    page = (ROOT / "docs/details.md").read_text(encoding="utf-8")
    method = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| Eq\. (\d+) \|", page, re.MULTILINE))
    assert listed == set(re.findall(r"^\*\*Eq\. (\d+)\*\*", method, re.MULTILINE))
    assert len(LINK.findall(page)) >= 14 + 34


def test_a_line_that_is_gone_is_named(tmp_path):
    (tmp_path / "code.py").write_text("a = 1\nb = 2\nb = 3\n")
    page = tmp_path / "page.md"
    page.write_text('[a](code.py#L9 "a = 1")')
    assert refreshed(page) == '[a](code.py#L1 "a = 1")'
    for piece in ("b =", "c ="):
        page.write_text(f'[b](code.py#L1 "{piece}")')
        with pytest.raises(ValueError, match=re.escape(repr(piece))):
            refreshed(page)


def test_the_page_about_models_names_what_is_read():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w[^|]*) \|", page, re.MULTILINE)
    kinds = [name.removesuffix("ForCausalLM") for name in ARCHITECTURES]
    assert all(kind in row for kind, row in zip(kinds, rows, strict=True))
    assert all(f"`{kind}`" in page for kind in SCALINGS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500
