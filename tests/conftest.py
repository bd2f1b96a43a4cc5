"""One thread unless OMP_NUM_THREADS says more: two collapse as soon as another process runs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for the processes that tests start

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():  # before triton is imported: @triton.jit looks at it once
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: processes end together if what is left at the end is small."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
