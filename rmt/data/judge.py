"""Compare an answer to a problem with the true one, for post-training (GRPO).

math-verify (Kydlíček, Hugging Face) decides, in a process that can be killed: model output is
hostile, and a power tower or a factorial would compute for ever, or fill the memory. `Judge` starts
one process, which imports math-verify once. A fork of it answers questions until one fails, takes
longer than SECONDS or more than MEMORY. Then the answer is wrong, and a new fork goes on without
importing anything. The process ends with the one that asks.
"""

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from mmap import mmap
from pathlib import Path

LONGEST = 1000  # characters of an answer; a longer one is compared as it is
SECONDS = 2.0  # per question
MEMORY = 2 << 30  # bytes of address space
START = 120.0  # seconds that importing math-verify may take on a busy machine
# What the process writes: READY once, then one of the others for each question.
READY, EQUAL, DIFFERENT, NO_VERDICT = b"!", b"1", b"0", b"?"


def require_math_verify() -> None:
    """ValueError when math-verify is missing."""
    if find_spec("math_verify") is None:
        raise ValueError(
            "answers to problems are compared by math-verify, which is not installed; "
            "`pip install 'math-verify[antlr4_13_2]'`"
        )


def same_answer(given: str, truth: str) -> bool:
    """Return True if `given`, the content of a \\boxed{}, equals `truth` in value or spelling."""
    given, truth = given.strip(), truth.strip()
    if given == truth or not given or max(len(given), len(truth)) > LONGEST:
        return given == truth != ""
    return _judged(given, truth)


@lru_cache(1 << 12)  # a group often repeats itself
def _judged(given: str, truth: str) -> bool:
    return _judge(os.getpid()).same(given, truth)


def take_failures() -> int:
    """Return how many answers were wrong without a verdict since the last call."""
    judge = _judge(os.getpid())
    failed, judge.failed = judge.failed, 0
    return failed


@cache
def _judge(_process: int) -> "Judge":
    """Return the judge of this process: a fork must not write to the pipe of its parent."""
    return Judge()


class Judge:
    """Compare two answers by value. `command` starts a process that speaks like `main` here."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-m", "rmt.data.judge")):
        self.command, self.process = command, None
        self.failed = 0  # answers that were wrong because there was no verdict

    def same(self, given: str, truth: str) -> bool:
        """Return False without a verdict in time, too; ChildProcessError if none can start."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        verdict = b""
        try:
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps([truth, given]).encode() + b"\n")
                verdict = self._read_byte(1.5 * SECONDS)  # the fork's own alarm comes first
        finally:  # interrupted, too: a late verdict would be taken for that of the next question
            if verdict not in (EQUAL, DIFFERENT, NO_VERDICT):
                self._stop()
        self.failed += verdict not in (EQUAL, DIFFERENT)
        return verdict == EQUAL

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        if self._read_byte(START) != READY:
            self._stop()
            raise ChildProcessError(
                f"`{' '.join(self.command)}`, which runs math-verify, does not start; look at what "
                "it prints"
            )

    def _read_byte(self, seconds: float) -> bytes:
        """Return the next byte of the process, or b"" if it ends or none comes in time."""
        output = self.process.stdout
        return output.read(1) if select.select([output], [], [], seconds)[0] else b""

    def _stop(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its fork, too
        self.process.wait()
        self.process.stdin.close(), self.process.stdout.close()
        self.process = None


def serve(same, answers: int) -> None:
    """Answer questions from stdin to the descriptor `answers`, in forks that may die of one."""
    busy = mmap(-1, 1)  # shared with the fork: 1 while it works on a question
    status = None
    while status != 0:
        busy[0] = 0
        if not (fork := os.fork()):
            _answer(same, answers, busy)
        _, status = os.waitpid(fork, 0)
        if busy[0]:
            os.write(answers, NO_VERDICT)


def _answer(same, answers: int, busy: mmap) -> None:
    """Run a fork: answer until the questions end (exit status 0) or one fails (another)."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the fork, whatever it is doing
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for question in os.fdopen(0, "rb", buffering=0, closefd=False):  # the rest: a new fork
        busy[0] = 1
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            verdict = same(*json.loads(question))
        except BaseException:
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        busy[0] = 0
        os.write(answers, EQUAL if verdict else DIFFERENT)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY // 2:
            os._exit(1)  # what it still holds might fail the next question
    os._exit(0)


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    from math_verify import parse, verify

    logging.disable()  # math-verify would warn that its timeouts are off

    def same(truth: str, given: str) -> bool:
        # Their own timeouts are Python's signal handlers, which a long product never reaches.
        sides = (parse(f"${x}$", parsing_timeout=None) for x in (truth, given))
        return verify(*sides, timeout_seconds=None)

    same("x+1", r"1+\frac{2x}{2}")  # builds the parser's tables, which is slow once
    os.write(answers, READY)
    with suppress(BrokenPipeError):  # the asking process has ended
        serve(same, answers)


if __name__ == "__main__":
    main()
