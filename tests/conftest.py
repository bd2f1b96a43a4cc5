"""One thread unless OMP_NUM_THREADS says more: two collapse as soon as another process runs."""

import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for the processes that tests start

import pytest
import torch

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
if not torch.cuda.is_available():  # before triton is imported: @triton.jit looks at it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from models.weights import cache_directory  # noqa: E402

# Difficulty that another run measured would hide that it is measured wrongly now.
CACHE = tempfile.TemporaryDirectory()
(Path(CACHE.name) / "rmt").mkdir()
for found in cache_directory().glob("*/config.json"):  # of `make smollm2`
    (Path(CACHE.name) / "rmt" / found.parent.name).symlink_to(found.parent)
os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
os.environ["XDG_CACHE_HOME"] = CACHE.name


@pytest.fixture(autouse=True)
def threads():
    """Every test has as many, whatever a benchmark in this process has set: else other bits."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def heeded_signals():
    """Signals as in the foreground of a shell: nohup and `&` leave some of them ignored."""
    ends = {signal.SIGINT: signal.default_int_handler}
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.signal(n, ends.get(n, signal.SIG_DFL)) for n in asking}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores: a third of two cores' time went by while tests waited for processes."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Long files first: processes end together if what is left at the end is small."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
