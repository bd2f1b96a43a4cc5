"""Nothing outside a run ends it unsaved: no signal that asks for it, and nothing that it prints.

A terminal without a character shows a question mark; a closed one, or a full disk, loses the text.
When the reader of a pipe is gone (`| head`) the text is lost too, and training saves and stops, as
it does for SIGTERM, SIGINT and SIGHUP. A signal that was ignored at the start (nohup) stays so.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Output:
    """A text stream that swallows what it cannot write; `lost` once nobody reads it."""

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
        except UnicodeEncodeError:  # of a stream that cannot be told to replace
            self._try(call, *(a.encode("ascii", "replace").decode() for a in arguments))
        except ValueError:  # it was closed
            pass
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                self.lost = True

    def end(self) -> None:
        """Give out what is left. If that fails it goes nowhere: Python's exit fails on it, too."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError, AttributeError):
                _open_nowhere(self.stream.fileno())


@contextmanager
def safe_printing() -> Iterator[None]:
    """Of all that is printed in this context, or in the function that it decorates."""
    before = sys.stdout, sys.stderr
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and C's output
            _open_nowhere(number)
    nowhere = io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8")
    outputs = [_Output(stream or nowhere) for stream in before]
    sys.stdout, sys.stderr = outputs
    try:
        yield
    finally:
        for output in outputs:
            output.end()
        sys.stdout, sys.stderr = before


def _open_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def nobody_reads() -> bool:
    """Whether the reader of what is printed is gone."""
    return any(getattr(stream, "lost", False) for stream in (sys.stdout, sys.stderr))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields whether something asked to stop so far. A second SIGTERM or SIGINT ends the process
    at once; a second SIGHUP does not, since a shell and the system send one each.
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
