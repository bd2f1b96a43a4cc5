"""Lock a directory, so that one run at a time writes there.

The lock is a POSIX record lock on OUT/lock. It ends with the process that holds it, even after
kill -9, and child processes do not inherit it.
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from rmt.system.dist import World, current, gather_objects

# Seconds to wait for a holder: one that runs, and one that was killed and still frees its memory.
GRACE, PATIENCE = 1.0, 60.0


@contextmanager
def held(name: str, out: Path, world: World | None = None) -> Iterator[None]:
    """Make and lock the directory that the flag `name` gives. All ranks; rank 0 holds the lock.

    ValueError on all ranks when another process holds it, or it cannot be written to.
    """
    world, lock, problem = world or current(), nullcontext(), ""
    if world.rank == 0:
        try:
            lock = _take(name, out)
        except ValueError as error:
            problem = str(error)
    with lock:
        if problem := gather_objects(problem, world)[0]:
            raise ValueError(problem)
        yield


def _take(name: str, out: Path) -> BinaryIO:
    """Return a file that holds the lock until it is closed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("ab+", buffering=0)
    except OSError as error:
        raise ValueError(
            f"{name} {out} cannot be written ({error.strerror}: {error.filename}); choose a "
            "directory that can"
        ) from None
    started = time.monotonic()
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, by the system
            lock.seek(0)
            holder = lock.read(200).decode("utf-8", "replace").strip()
            if time.monotonic() < started + (PATIENCE if _was_killed(holder) else GRACE):
                time.sleep(0.05)
                continue
            lock.close()
            raise ValueError(
                f"{name} {out} is in use by another run (process {holder}); wait for it or stop "
                "it, or choose another directory"
            ) from None
        except OSError as error:  # a file system without locks
            remark = f"cannot be locked ({error.strerror}): start no second run in {out}"
            print(out / "lock", remark, file=sys.stderr)
            break
    with suppress(OSError):  # on a full disk the lock has no name
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def _was_killed(holder: str) -> bool:
    """Return whether it is a process of this machine that was killed and is not quite gone."""
    number, _, host = holder.partition(" on ")
    if host != socket.gethostname() or not Path("/proc/self/exe").exists():  # Linux
        return False
    try:
        os.readlink(f"/proc/{number}/exe")  # gone as soon as the memory is
    except OSError as error:  # or it is another user's
        return isinstance(error, FileNotFoundError)
    return False
