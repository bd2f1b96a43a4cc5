"""Two hosts train together; a rank is killed, then a cable pulled. Nobody has to do anything.

One run of 10 steps goes through both, in about a minute of two idle cores. It is skipped where
network namespaces cannot be made.
"""

import os
import signal
import uuid

import pytest
from hosts import NoNamespaces, rank_of, stop, two_hosts
from small_run import (
    ROOT,
    arguments,
    metrics,
    run_here,
    wait_until,
    write_corpus,
    write_small_model,
)

STEPS, PATIENCE = 10, 10  # seconds that a rank waits for another
SETTINGS = dict(batch_size=4, steps=STEPS, save_every=2, keep=2, timeout=PATIENCE)
LOST = "has lost another rank"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    return place


@pytest.fixture(scope="module")
def alone(inputs):
    """The run that nothing happens to, of one process."""
    run_here(*arguments(inputs, out=inputs / "alone", **SETTINGS))
    return metrics(inputs / "alone")


def live(hosts, inputs):
    """What the hosts said until the kill was over, and after; and how they ended."""
    name, out = uuid.uuid4().hex, inputs / "out"
    outputs = [inputs / f"host{number}.txt" for number in (1, 2)]
    said = lambda: "".join(output.read_text() for output in outputs)
    until = lambda condition: wait_until(condition, ranks[0], pause=0.05)
    script = [str(ROOT / "train.py"), *arguments(inputs, out=out, **SETTINGS)]
    ranks = [h.torchrun(script, path, name, hosts[0]) for h, path in zip(hosts, outputs)]
    try:
        until(lambda: len(metrics(out)) >= 3)
        os.kill(rank_of(name, 1), signal.SIGKILL)
        until(lambda: "continuing from" in said())
        killed = said()
        until(lambda: len(metrics(out)) >= 6)
        hosts[1].cable("down")
        until(lambda: LOST in said()[len(killed) :])
        hosts[1].cable("up")
        codes = [process.wait(180) for process in ranks]
        texts = [output.read_text() for output in outputs]
        return dict(killed=killed, texts=texts, codes=codes, rows=metrics(out), out=out)
    finally:
        stop(ranks)


@pytest.fixture(scope="module")
def life(inputs):
    try:
        with two_hosts() as hosts:
            return live(hosts, inputs)
    except NoNamespaces as reason:
        pytest.skip(f"network namespaces cannot be made here: {reason}")


def test_run_survives_a_killed_rank_and_a_pulled_cable(life, alone):
    assert life["codes"] == [0, 0], "\n".join(life["texts"])
    assert [row["step"] for row in life["rows"]] == list(range(STEPS))
    for given, expected in zip(life["rows"], alone):
        for key in ("budget", "draw/easy", "loss/rl", "loss/ntp"):
            assert given[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    assert (life["out"] / "model/model.safetensors").is_file()


def test_each_restart_continues_from_a_checkpoint(life):
    said = [line for line in "".join(life["texts"]).splitlines() if "continuing from" in line]
    places = [line.split("step-")[1] for line in said]
    assert len(places) >= 2 and places == sorted(places)
    assert places[0] in ("000002", "000004") and places[-1] >= "000004"


def test_what_is_left_of_a_killed_rank_is_said_in_a_line(life):
    lines = [line for line in life["killed"].splitlines() if LOST in line]
    assert lines and all("error: rank " in line for line in lines)  # perhaps after a bar
    assert any("onnection" in line for line in lines)  # closed, or reset by its peer
    assert all("torchrun starts all ranks again" in line for line in lines)


def test_a_pulled_cable_is_said_when_patience_ends(life):
    for text in life["texts"]:  # on both sides of the cut
        lines = [line for line in text.splitlines() if LOST in line and "imeout" in line]
        assert lines and all("network is cut" in line for line in lines)
        assert "RuntimeError" not in text
