"""Scripts started from a test, as forks of a process that has imported PyTorch and our modules.

A process of its own takes two seconds for that. A fork has its own memory, signals, environment and
exit status all the same.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

PRELOADED = ("train", "torch._dynamo", "torch.distributed.checkpoint", "jinja2.sandbox")
multiprocessing.set_forkserver_preload(list(PRELOADED))  # what is not found there is left out
SERVER = multiprocessing.get_context("forkserver")


class Fork:
    """train.py with these arguments; the methods are those of subprocess.Popen."""

    def __init__(self, arguments: list[str]):
        file, self.path = tempfile.mkstemp(suffix=".txt")
        os.close(file)
        known = (arguments, self.path, dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""})
        self.process = SERVER.Process(target=_train, args=known)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it printed until it ended."""
        self.process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        return Path(self.path).read_text(), None


def _train(arguments: list[str], path: str, environment: dict[str, str]) -> None:
    become(environment)
    with open(path, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    import train

    sys.argv = ["train.py", *arguments]
    train.main(arguments)


def become(environment: dict[str, str]) -> None:
    """Have this environment, not that of the time when the first fork was started."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # else MKL chooses: other bits
