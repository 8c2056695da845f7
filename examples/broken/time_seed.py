"""The mistake: numpy is seeded by the time, so no two runs are the same, interrupted or not.

Mended: `ckptd.seed_everything(1)`.
"""

import time

import numpy as np
import torch
from torch import nn

import ckptd


def main():
    np.random.seed(time.time_ns() % 2**32)
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = ckptd.attach(model=model, optimizer=optimizer)
    for _ in job.loop(range(12)):
        loss = model(torch.from_numpy(np.random.randn(16, 8)).float()).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
