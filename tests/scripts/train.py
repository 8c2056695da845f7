"""plain.py with ckptd, and with moments at which it can interrupt itself (see interruption.py).

    ckptd launch -- python train.py OUT WORKERS

Writes OUT/metrics.csv and OUT/result.safetensors (weights, optimizer state, every loss).
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from interruption import Interruption
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ckptd

EPOCHS, SAMPLES, BATCH = 3, 64, 8


class Samples(Dataset):
    """Vectors, augmented with each of the three global streams."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, 12) * (index % 7 + 1) / 7
        x = x + 0.1 * torch.randn(12) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x, index % 3


def main():
    out, workers = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)

    model = nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_loader = DataLoader(Samples(), BATCH, shuffle=True, num_workers=workers)
    val_loader = DataLoader(Samples(), BATCH, shuffle=True, num_workers=workers)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=EPOCHS * len(train_loader)
    )
    losses = []
    interruption = Interruption()
    job = ckptd.attach(
        model=model, optimizer=optimizer, scheduler=scheduler, losses=losses, probe=interruption
    )
    interruption.job = job
    job.vars(best=float("inf"))
    metrics = job.open(out / "metrics.csv")
    metrics.write("epoch,loss\n")

    interruption.at("before the first step")
    for epoch in job.loop(range(EPOCHS)):
        model.train()
        for x, y in job.loop(train_loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if epoch == 0 and len(losses) == 3:
                interruption.checkpoint_first()
            if epoch == 1 and len(losses) == 13:
                interruption.at("mid-epoch")

        if epoch == 1:
            interruption.at("between epochs")
        model.eval()
        job.vars.total = 0.0
        with torch.no_grad():
            for x, y in job.loop(val_loader, on_resume="restart"):
                if epoch == 1:
                    interruption.at("evaluation")
                job.vars.total += nn.functional.cross_entropy(model(x), y).item()
        job.vars.best = min(job.vars.best, job.vars.total)
        metrics.write(f"{epoch},{job.vars.total.hex()},{job.vars.best.hex()},{losses[-1].hex()}\n")

    metrics.close()
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in entry.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["random"] = torch.tensor([random.random(), np.random.rand()], dtype=torch.float64)
    tensors["torch"] = torch.rand(4)
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "result.safetensors")


if __name__ == "__main__":
    main()
