"""Keep a run alive when its terminal is closed, and save before a signal stops it.

Text that cannot be written is dropped (a closed stream, a full disk); a character that the encoding
lacks is a question mark. When the reader of a pipe is gone (`| head`), or on SIGTERM, SIGINT and
SIGHUP, training saves and stops. A signal ignored at the start (nohup) stays ignored.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Output:
    """A text stream that drops what it cannot write; `lost` once its reader is gone."""

    def __init__(self, stream: Any):
        self.stream, self.lost = stream, False
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="replace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except (BrokenPipeError, ConnectionResetError):
            self.lost = True
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass

    def end(self) -> None:
        """Flush; if that fails, send the rest to /dev/null, or Python's exit would fail as well."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError, AttributeError):
                _open_null(self.stream.fileno())


@contextmanager
def safe_printing() -> Iterator[None]:
    """Let no error of stdout or stderr through, in a `with` block or a decorated function."""
    before = sys.stdout, sys.stderr
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get its number, and C's output
            _open_null(number)
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout, sys.stderr = outputs = [_Output(stream or nowhere) for stream in before]
    try:
        yield
    finally:
        for output in outputs:
            output.end()
        sys.stdout, sys.stderr = before


def _open_null(number: int) -> None:
    """Open /dev/null as this file descriptor."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def nobody_reads() -> bool:
    """Return whether the reader of stdout or stderr is gone."""
    return any(getattr(stream, "lost", False) for stream in (sys.stdout, sys.stderr))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether something asked to stop.

    A second SIGTERM or SIGINT ends the process at once. A second SIGHUP does not: a shell and the
    system send one each.
    """
    asked: list[int] = []

    def note(number: int, _frame) -> None:
        asked.append(number)
        if number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)

    heeded = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield lambda: bool(asked) or nobody_reads()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
