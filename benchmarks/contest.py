"""A contest: contenders run in processes of their own and take turns.

A process (`python -m benchmarks.X --contender NAME ...`) loads its model and then waits on its
standard input. Its parent asks for one turn at a time, A B C A B C, so that a change of the machine
affects all, and exactly one works at any moment: the others sleep in a read, and OpenMP's threads
stop spinning within milliseconds. The first turn of each is a warm-up and is not counted.

seconds   from the request to the end of the work on the device, measured in the working process
peak      of the whole process since its start: Linux's VmHWM, with libraries and weights; on a GPU
          the high-water mark of PyTorch's allocator in this process

A peer that cannot run keeps its row, with the reason instead of numbers. Ours must run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from benchmarks import machine
from benchmarks.results import spread
from rmt.system.metrics import peak_memory

OURS = "ours"
WORDS = ("seconds", "peak_bytes", "tokens")  # of an answer to a turn; other keys are kept


class Unavailable(Exception):
    """A contender cannot take part; it gives the reason before its first turn."""


class Failed(Unavailable):
    """A contender's process ended; the message has its last lines of output."""


class Turns:
    """The contender's end: `while turns.begin(): work(); turns.end(tokens=n)`."""

    def __init__(self, device: torch.device):
        self.device, self.started, self.greeted = device, 0.0, False
        self.actions: dict[str, Callable[..., dict]] = {}  # other requests, by name
        # Libraries print to stdout: keep that apart from answers.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def begin(self) -> bool:
        """Wait to be asked for a turn; False when the contest is over."""
        if not self.greeted:
            self.say({"threads": torch.get_num_threads()})
            self.greeted = True
        while line := sys.stdin.readline():
            request = json.loads(line)
            if request["do"] == "turn":
                self.started = time.perf_counter()
                return True
            self.say(self.actions[request["do"]](*request["with"]))
        return False

    def end(self, tokens: int, **more: Any) -> None:
        """Answer with the seconds since `begin`, the peak memory and the given values."""
        seconds = self.elapsed()
        peak = peak_memory(self.device)
        self.say({"seconds": seconds, "peak_bytes": peak, "tokens": tokens, **more})

    def elapsed(self) -> float:
        """Return the seconds since `begin`, after waiting for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.started

    def say(self, answer: dict) -> None:
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()


def take_part(contender: Callable[[Any, Turns], None], options: Any) -> None:
    """Run a contender in its process."""
    turns = Turns(machine.device_here())
    torch.set_num_threads(options.threads)
    try:
        contender(options, turns)
    except Unavailable as reason:
        turns.say({"unavailable": str(reason)})


class Player:
    """The parent's end of one contender."""

    def __init__(self, module: str, name: str, flags: Sequence[str]):
        self.name = name
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", module, "--contender", name, *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"failed (exit status {self.process.wait()}): {self.last_words()}")
        found = json.loads(line)
        if "unavailable" in found:
            raise Unavailable(found["unavailable"])
        return found

    def ask(self, what: str, *arguments: Any) -> dict:
        with suppress(BrokenPipeError):  # if it has ended, `answer` raises with the reason
            self.process.stdin.write(json.dumps({"do": what, "with": arguments}) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def last_words(self, lines: int = 3) -> str:
        self.log.seek(0)
        said = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return " | ".join(said[-lines:])

    def leave(self, kill: bool = False) -> None:
        """End the process: close its input and let it exit, or kill it in the middle of a turn."""
        if kill:
            self.process.kill()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # some libraries do not exit
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


Check = Callable[[Player, Player], dict]  # ours and a peer -> the comparison, with `agrees`


def hold(
    module: str,
    names: Sequence[str],
    flags: Sequence[str],
    rounds: int,
    check: Check | None = None,
    absent: Mapping[str, str] | None = None,
    together: bool = True,
) -> list[dict]:
    """Return a row per contender, ours first. SystemExit if ours fails or a peer disagrees.

    absent: contender -> reason why it cannot take part. together=False runs one after another, for
    models of which memory holds only one.
    """
    reasons = absent or {}
    rows = [{"contender": n} | ({"reason": reasons[n]} if n in reasons else {}) for n in names]
    for group in [rows] if together else [[row] for row in rows]:
        players: dict[str, Player] = {}
        clean = False
        try:
            _play(module, flags, group, rounds, check, players)
            clean = True
        finally:
            for player in players.values():
                player.leave(kill=not clean)
    return [_summary(row) for row in rows]


def _play(module, flags, rows, rounds, check: Check | None, players: dict[str, Player]) -> None:
    """Start, compare, warm up, take turns. A row with a reason is skipped."""
    for row in rows:
        if "reason" not in row:
            players[row["contender"]] = Player(module, row["contender"], flags)
    for row in rows:  # loading is not timed, so all may load at the same time
        _try(row, players, Player.answer)
    for row in rows[1:] if check else ():
        _try(row, players, lambda player: {"check": check(players[OURS], player)})
        if not row.get("check", {}).get("agrees", True):
            sys.exit(f"{row['contender']} and ours disagree: {row['check']}")
    for number in range(rounds + 1):
        for row in rows:
            _try(row, players, lambda player: player.ask("turn"), keep=number > 0)


def _try(row: dict, players: dict[str, Player], do: Callable, keep: bool = True) -> None:
    """Add a player's answer to its row; a peer that fails leaves, and its row gets the reason."""
    name = row["contender"]
    if "reason" in row:
        return
    try:
        found = do(players[name])
    except Unavailable as reason:
        if name == OURS:
            sys.exit(f"ours failed: {reason}")
        row.update(contender=name, reason=str(reason))
        players.pop(name).leave(kill=True)
        return
    if "seconds" in found:
        turns = row.setdefault("turns", [])
        row["peak_bytes"] = found["peak_bytes"]
        if keep:
            turns.append(found)
        print(f"  {name} {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    else:
        row.update(found)


def _summary(row: dict) -> dict:
    """Reduce a contender's turns to medians."""
    turns = row.pop("turns", None)
    if not turns or "reason" in row:
        return row
    tokens = statistics.median(turn["tokens"] for turn in turns)
    extra = {k: statistics.median(t[k] for t in turns) for k in turns[0] if k not in WORDS}
    return row | spread([turn["seconds"] for turn in turns], tokens) | extra
