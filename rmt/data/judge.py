"""math-verify behind a pipe: what a model wrote is parsed in a process that can be killed.

A power tower or a factorial would compute for ever, or fill the memory. `Judge` starts one
process, which imports math-verify once; a fork of it answers questions until one fails, takes
longer than SECONDS, or much of MEMORY: then that fork ends, the answer is wrong, and the next fork
goes on, without importing anything anew. It ends with the process that asks.
"""

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 2.0  # of a question
MEMORY = 2 << 30  # bytes of address space
MOST = 1000  # questions of one fork: their numbers have to fit into a pipe
START = 120.0  # seconds that importing math-verify may take on a busy machine


class Judge:
    """Compares two answers by value. `command` starts a process that speaks like `main` here."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-m", "rmt.data.judge")):
        self.command, self.process = command, None
        self.asked = self.failed = 0  # failed: wrong because there was no verdict

    def same(self, given: str, truth: str) -> bool:
        """False, too, if there is no answer within SECONDS. RuntimeError if none can start."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        self.asked += 1
        question = json.dumps([self.asked, truth, given]).encode() + b"\n"
        with suppress(BrokenPipeError):
            self.process.stdin.write(question)
            # Its own alarm comes first, unless it has lost its way altogether.
            until = time.monotonic() + 1.5 * SECONDS
            while line := self._line(until):
                number, _, verdict = line.partition(b" ")
                if number == b"%d" % self.asked:
                    self.failed += verdict not in (b"True", b"False")
                    return verdict == b"True"
        self._stop()
        self.failed += 1
        return False

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        if self._line(time.monotonic() + START) != b"ready":
            self._stop()
            raise RuntimeError(
                f"math-verify is installed, but `{' '.join(self.command)}` does not start; look at "
                "what it prints, or uninstall math-verify"
            )

    def _line(self, until: float) -> bytes:
        """The next line, empty if none comes in time."""
        line, out = b"", self.process.stdout
        while (left := until - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
            if not (byte := out.read(1)) or byte == b"\n":
                return line if byte else b""
            line += byte
        return b""

    def _stop(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its fork, too
        self.process.wait()
        self.process.stdin.close(), self.process.stdout.close()
        self.process = None


def serve(same, answers: int, questions: int = 0) -> None:
    """Answer questions from one descriptor to another, in forks that may die of a question."""
    asking, answering = os.pipe()  # the number of the question that a fork died of
    while True:
        if not (fork := os.fork()):
            _answer(same, answers, questions, answering)
        _, status = os.waitpid(fork, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return
        numbers = os.read(asking, 1 << 16).split()  # not empty: it only dies of a question
        os.write(answers, numbers[-1] + b" failed\n")  # a second answer is passed over


def _answer(same, answers: int, questions: int, answering: int) -> None:
    """In a fork: answer until the questions end."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the fork, whatever it is doing
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in os.fdopen(questions, "rb", buffering=0, closefd=False):
        number, truth, given = json.loads(line)
        os.write(answering, b"%d " % number)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            verdict = same(truth, given)
        except BaseException:
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(answers, b"%d %s\n" % (number, str(bool(verdict)).encode()))
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if used > MEMORY // 2 or number % MOST == 0:
            os._exit(1)  # what it still holds might fail the next question
    os._exit(0)


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    from math_verify import parse, verify

    logging.disable()  # it warns of the timeouts that it is told not to have

    def same(truth: str, given: str) -> bool:
        # Their own timeouts are Python's signal handlers, which a long product never reaches.
        sides = (parse(f"${x}$", parsing_timeout=None) for x in (truth, given))
        return bool(verify(*sides, timeout_seconds=None))

    same("x+1", r"1+\frac{2x}{2}")  # builds the parser's tables, which is slow once
    os.write(answers, b"ready\n")
    with suppress(BrokenPipeError):  # who asked has gone
        serve(same, answers)


if __name__ == "__main__":
    main()
