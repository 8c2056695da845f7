"""Seeding everything at once."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """See `ckptd.seed_everything`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global stream is what scripts use
    torch.manual_seed(seed)  # the CPU and every CUDA device
    if deterministic:
        # cuBLAS reads it when it makes its first handle, so it is set before any work is done.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
