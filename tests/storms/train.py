"""A short run with every usual source of randomness; it is its own reference when run plainly.

    python train.py OUT EPOCHS WORKERS                      plainly
    ckptd launch -- python train.py OUT EPOCHS WORKERS      under a storm

Writes OUT/metrics.csv (a line a step) and OUT/result.safetensors (weights, optimizer state, every
loss, the generators at the end). Prints "step N of process PID" after each step.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ckptd

SAMPLES, BATCH, WIDTH = 48, 4, 160


class Samples(Dataset):
    """Vectors, augmented with each of the three global streams."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, WIDTH) * (index % 7 + 1) / 7
        return x + 0.1 * torch.randn(WIDTH) + random.random() + float(np.random.rand()), index % 3


def main(out, epochs, workers):
    ckptd.seed_everything(7)
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(WIDTH, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Samples(), BATCH, shuffle=True, num_workers=workers)
    losses = []
    job = ckptd.attach(model=model, optimizer=optimizer, losses=losses)
    job.vars(best=float("inf"), total=0.0)
    metrics = job.open(out / "metrics.csv")
    metrics.write("step,loss\n")

    for _ in job.loop(range(epochs)):
        model.train()
        for x, y in job.loop(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            metrics.write(f"{len(losses)},{losses[-1].hex()}\n")
            print("step", len(losses), "of process", os.getpid(), flush=True)
        model.eval()
        job.vars.total = 0.0
        with torch.no_grad():
            for x, y in job.loop(loader, on_resume="restart"):
                job.vars.total += nn.functional.cross_entropy(model(x), y).item()
        job.vars.best = min(job.vars.best, job.vars.total)
        metrics.write(f"best,{job.vars.best.hex()}\n")

    metrics.close()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["drawn"] = torch.tensor([random.random(), np.random.rand()], dtype=torch.float64)
    tensors["torch"] = torch.rand(4)
    save_file(tensors, out / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
