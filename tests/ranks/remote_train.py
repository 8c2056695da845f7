"""DDP on the CPU, with random streams, buffers and losses that differ by rank. Writes what it came
to into `losses-RANK.txt` and `final-RANK.txt`."""

import hashlib
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ckptd

rank = int(os.environ["RANK"])
slow_s = float(os.environ.get("SLOW", "0"))
dist.init_process_group("gloo")
torch.manual_seed(0)
random.seed(rank)
np.random.seed(rank)
net = nn.Sequential(nn.Linear(40, 100), nn.BatchNorm1d(100), nn.Dropout(0.1), nn.Linear(100, 4))
ballast = torch.randn(700_000)  # so that a snapshot travels in several pieces
ddp = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.05)
optimizer = torch.optim.AdamW(ddp.parameters(), 1e-3)
generator = torch.Generator().manual_seed(5)
data = TensorDataset(
    torch.randn(480, 40, generator=generator), torch.randint(0, 4, (480,), generator=generator)
)
sampler = DistributedSampler(data, shuffle=True, seed=3)
loader = DataLoader(data, 8, sampler=sampler)
torch.manual_seed(100 + rank)
job = ckptd.attach(model=ddp, optimizer=optimizer, ballast=ballast)
job.vars(seen=0.0)
out = job.open(f"losses-{rank}.txt")
for epoch in job.loop(range(2)):
    sampler.set_epoch(epoch)
    for x, y in job.loop(loader):
        x = x + random.random() * 1e-3 * np.random.rand() + ballast[0]
        loss = nn.functional.cross_entropy(ddp(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ballast.add_(1e-3)
        job.vars.seen += loss.item()
        out.write(f"{loss.item().hex()}\n")
        job.log(loss=loss.item())
        if rank == 0:
            print("step", job.words[1] + 1 if hasattr(job, "words") else 0, flush=True)
        time.sleep(slow_s)
digest = hashlib.sha256()
for tensor in (*ddp.state_dict().values(), ballast):
    digest.update(tensor.numpy().tobytes())
Path(f"final-{rank}.txt").write_text(f"{digest.hexdigest()} {job.vars.seen.hex()}\n")
dist.destroy_process_group()
