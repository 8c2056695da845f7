"""A DataLoader-bound epoch, plain and in `job.loop`: seconds of each, in turn, as JSON to OUT.

A sample takes 100 µs of computing and draws from each of the three global random streams.
"""

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import ckptd

SAMPLE_S = 100e-6


class Samples(Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        until = time.perf_counter() + SAMPLE_S
        drawn = random.random() + np.random.rand() + torch.rand(1)
        while time.perf_counter() < until:
            pass
        return drawn


def epoch(batches):
    """From the first batch to the last: starting the workers is not what is asked here."""
    iterator = iter(batches)
    next(iterator)
    began = time.perf_counter()
    for _ in iterator:
        pass
    return time.perf_counter() - began


def main():
    out, repeats, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    loader = DataLoader(Samples(32 * 200), batch_size=32, shuffle=True, num_workers=workers)
    job = ckptd.attach()
    pairs = []
    for number in range(repeats):  # the order changes, so that a drift of the machine cancels out
        if number % 2:
            plain = epoch(loader)
            pairs.append((epoch(job.loop(loader)), plain))
        else:
            pairs.append((epoch(job.loop(loader)), epoch(loader)))
    out.write_text(json.dumps(pairs))


if __name__ == "__main__":
    main()
