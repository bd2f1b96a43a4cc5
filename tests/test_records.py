"""Lines end at "\\n" alone, one that a kill cut short is no record, and nothing written is lost."""

import errno
import json
import os
import random

import pytest

from rmt.system.records import append, check_writable, read_lines, set_aside, write_whole

TEXTS = ("a\u2028b", "a\u2029b", "a\x85b", "a\x0bb\x0cc\x1cd\x1de\x1ef", "\ud800", "a\nb\r\n", "∑")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "samples.jsonl"


def replaced(path):
    return path.with_name("samples.replaced.jsonl")


def lines(*steps):
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_record_is_read_as_it_was_written_whatever_ends_a_line_elsewhere(path, text):
    append(path, [{"step": 0, "response": text}, {"step": 1, "response": text}])
    assert read_lines(path) == [{"step": k, "response": text} for k in (0, 1)]
    set_aside(path, 1)
    assert read_lines(path) == [{"step": 0, "response": text}]
    assert read_lines(replaced(path)) == [{"step": 1, "response": text}]


def test_numbers_that_json_has_not_are_null(path):
    append(path, [{"step": 0, "loss": float("nan"), "of": [float("inf"), 1.0]}])
    assert json.loads(path.read_text()) == {"step": 0, "loss": None, "of": [None, 1.0]}


def test_steps_that_come_again_are_set_aside_each_time(path):
    path.write_text(lines(0, 1, 2, 3))
    set_aside(path, 2)
    assert path.read_text() == lines(0, 1)
    append(path, [{"step": 2}])
    set_aside(path, 1)
    assert path.read_text() == lines(0)
    assert replaced(path).read_text() == lines(2, 3, 1, 2)


@pytest.mark.parametrize("torn", ['{"step": 1, "resp', '{"step": 1', "{", '{"step": 1}'])
def test_last_line_without_an_end_is_whole_or_set_aside(path, torn):
    path.write_text(lines(0) + torn)
    set_aside(path, 2)
    append(path, [{"step": 2}])
    whole = torn.endswith("}")
    assert path.read_text() == lines(*(0, 1, 2) if whole else (0, 2))
    assert replaced(path).exists() != whole


@pytest.mark.parametrize(
    "line", ["3", "[]", "null", '{"loss": 1}', '{"step": "x"}', "[" * 9999, ""]
)
def test_line_that_is_no_record_is_neither_read_nor_lost(path, line):
    path.write_text(lines(0) + line + "\n" + lines(1))
    assert read_lines(path) == [{"step": 0}, {"step": 1}]
    set_aside(path, 2)
    assert path.read_text() == lines(0, 1)
    assert replaced(path).read_text() == line + "\n"


def test_bytes_that_are_no_text_are_neither_read_nor_lost(path):
    path.write_bytes(lines(0).encode() + b'{"step": 1, "x": "\xff"}\n' + lines(2).encode())
    assert read_lines(path) == [{"step": 0}, {"step": 2}]
    set_aside(path, 9)
    assert replaced(path).read_bytes() == b'{"step": 1, "x": "\xff"}\n'


def test_no_line_is_lost_wherever_a_file_was_cut(path):
    """Sixty cuts, each followed by a resume somewhere."""
    rng = random.Random(0)
    whole = "".join(json.dumps({"step": k, "x": "é\u2028" * k}) + "\n" for k in range(6)).encode()
    for _ in range(60):
        cut = whole[: rng.randrange(len(whole) + 1)]
        path.write_bytes(cut)
        replaced(path).unlink(missing_ok=True)
        step = rng.randrange(7)
        set_aside(path, step)
        left = replaced(path).read_bytes() if replaced(path).exists() else b""
        together = sorted((path.read_bytes() + left).split(b"\n"))
        assert [x for x in together if x] == sorted(x for x in cut.split(b"\n") if x)
        assert all(record["step"] < step for record in read_lines(path))


def test_file_with_nothing_to_set_aside_is_not_written_again(path):
    path.write_text(lines(0, 1))
    path.chmod(0o444)
    before = os.stat(path)
    set_aside(path, 2)
    assert os.stat(path) == before and not replaced(path).exists()


def test_missing_file_has_no_records(path):
    set_aside(path, 0)
    assert read_lines(path) == [] and not path.exists()


# ---- whole files


def test_file_that_cannot_be_replaced_stays_as_it_was(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(path, "first\n")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=f"No space.*{path.name}"):
        write_whole(path, "second\n")
    assert path.read_text() == "first\n" and [p.name for p in path.parent.iterdir()] == [path.name]


def test_file_behind_a_link_is_written_and_the_link_stays(path, tmp_path):
    (tmp_path / "data").mkdir()
    path.symlink_to(tmp_path / "data" / "there.json")
    write_whole(path, "é")
    write_whole(path, "ü")
    assert path.is_symlink() and (tmp_path / "data" / "there.json").read_bytes() == "ü".encode()


def test_file_behind_a_link_is_written_beside_itself(tmp_path):
    """A rename from another file system, or from a folder that others may write, would fail."""
    links, real = tmp_path / "links", tmp_path / "real"
    links.mkdir(), real.mkdir()
    (links / "link.json").symlink_to(real / "there.json")
    links.chmod(0o500)
    try:
        check_writable("--json", links / "link.json")
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            replace = os.replace
            patch.setattr(os, "replace", lambda a, b: (seen.append((a, b)), replace(a, b)))
            write_whole(links / "link.json", "é")
    finally:
        links.chmod(0o700)
    assert [path.parent for path in seen[0]] == [real, real]
    assert [path.name for path in real.iterdir()] == ["there.json"]


def test_a_link_to_itself_is_no_traceback(tmp_path):
    path = tmp_path / "loop.json"
    path.symlink_to(path)
    check_writable("--json", path)
    write_whole(path, "é")
    assert path.read_text(encoding="utf-8") == "é"


@pytest.mark.parametrize("name", ["new.json", "folder/deeper/new.json", "old.json", "/dev/null"])
def test_path_that_can_be_written_is_left_as_it_is(tmp_path, name):
    (tmp_path / "old.json").write_text("mine")
    path = tmp_path / name
    check_writable("--json", path)
    assert (tmp_path / "old.json").read_text() == "mine"
    assert path.exists() == (name in ("old.json", "/dev/null"))


def test_path_that_cannot_be_written_is_named_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    for name, reason in (("file/x.json", "File exists|Not a directory"), ("", "a directory")):
        with pytest.raises(
            ValueError, match=rf"--json \S+ cannot be written \(({reason}): .*; give"
        ):
            check_writable("--json", tmp_path / name)
