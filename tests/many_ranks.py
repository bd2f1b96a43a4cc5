"""Processes that are ranks of one group, started from a test as forks (forks.py)."""

import os
import socket
import time

import torch
import torch.multiprocessing as mp
from forks import become

from rmt.system import dist

TIMEOUT = 240  # seconds; a hang is a failure


def on_ranks(count, place, work, start_method="forkserver"):
    """[results of rank 0, of rank 1, ...]; AssertionError when a rank hangs or fails.

    work(rank, port, place) joins the group and saves its results as rank0.pt, rank1.pt, ...
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.start_processes(
        _rank, (work, port, place, dict(os.environ)), count, join=False, start_method=start_method
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):  # False as soon as one of them has ended
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(place / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def _rank(rank, work, port, place, environment):
    become(environment)
    work(rank, port, place)
    dist.stop()


def join(rank, count, port):
    """The world of this rank, as if torchrun had started it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return dist.start()
