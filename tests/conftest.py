"""One thread for all tests: two OpenMP threads collapse as soon as another process runs."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before triton is imported: @triton.jit looks at it once
    os.environ.setdefault("TRITON_INTERPRET", "1")
