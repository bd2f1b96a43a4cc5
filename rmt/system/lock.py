"""One process, or group of processes, at a time works in a directory.

The lock is one of the operating system's on OUT/lock: it ends with the process that holds it,
however that ends, and no process that it had started keeps it.
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rmt.system.dist import World, gather_objects

GRACE, PATIENCE = 1.0, 60.0  # seconds: to end; to give back its memory, for one that was killed


@contextmanager
def held(name: str, out: Path, world: World | None = None) -> Iterator[None]:
    """The directory that the flag `name` gives, which is made if need be. All ranks; rank 0 holds.

    ValueError on all ranks when another process has it, or it cannot be written to.
    """
    lock, problem = None, None
    if world is None or world.rank == 0:
        try:
            lock = _take(name, out)
        except ValueError as error:
            problem = str(error)
    try:
        if world is not None:
            problem = gather_objects(problem, world)[0]
        if problem is not None:
            raise ValueError(problem)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _take(name: str, out: Path) -> int:
    """The open file that holds the lock until it is closed."""
    path = out / "lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
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
            holder = os.pread(lock, 200, 0).decode("utf-8", "replace").strip()
            if time.monotonic() < started + (PATIENCE if _ends(holder) else GRACE):
                time.sleep(0.05)
                continue
            os.close(lock)
            raise ValueError(
                f"{name} {out} is in use by another run (process {holder}); wait for it or stop "
                "it, or choose another directory"
            ) from None
        except OSError as error:  # a file system without locks
            print(
                f"{path} cannot be locked ({error.strerror}): start no second run in {out}",
                file=sys.stderr,
            )
            break
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _ends(holder: str) -> bool:
    """Whether it is a process of this machine that has been killed but is not quite gone."""
    number, _, host = holder.partition(" on ")
    if host != socket.gethostname():
        return False
    try:
        os.readlink(f"/proc/{number}/exe")  # Linux; gone with the memory
    except FileNotFoundError:
        return Path("/proc/self/exe").exists()
    except OSError:  # another user's
        return False
    return False
