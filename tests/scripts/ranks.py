"""Several ranks: DDP in several buckets, streams and losses of each rank's own, accumulation, an
evaluation. What goes wrong with it is given in $FAULTS ("RANK,STEP,KIND …"); each goes wrong once.
Writes what it came to into `losses-RANK.txt` and `final-RANK.txt`."""

import hashlib
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ckptd

rank = int(os.environ["RANK"])
faults = {tuple(f.split(",")[:2]): f.split(",")[2] for f in os.environ.get("FAULTS", "").split()}
only_first = "only-first" in sys.argv  # an evaluation that the other ranks do not go through


def net():
    return nn.Sequential(
        *(nn.Linear(40, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4)),
    )


def go_wrong(where):
    kind = faults.get((str(rank), where))
    if kind is None or Path(f"fault-{where}").exists():
        return
    Path(f"fault-{where}").touch()
    supervisor = job._link.supervisor_pid()
    if kind == "wait":
        while job.words[0] == job.answered:
            time.sleep(0.001)
    elif kind == "term":
        os.kill(supervisor, signal.SIGTERM)
        while job.words[0] == job.answered:
            time.sleep(0.001)
    elif kind == "supervisor":
        os.kill(supervisor, signal.SIGKILL)
        while not job._link.orphaned:
            time.sleep(0.001)
    elif kind == "flush":
        os.kill(supervisor, signal.SIGUSR2)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "exit":
        os._exit(3)
    else:
        raise RuntimeError("as the test wants it")


dist.init_process_group("gloo")
torch.manual_seed(0)
random.seed(rank)
np.random.seed(rank)
ddp = DistributedDataParallel(net(), bucket_cap_mb=0.05)
optimizer = torch.optim.AdamW(ddp.parameters(), 1e-3)
generator = torch.Generator().manual_seed(5)
data = TensorDataset(
    torch.randn(480, 40, generator=generator), torch.randint(0, 4, (480,), generator=generator)
)
sampler = DistributedSampler(data, shuffle=True, seed=3)
loader = DataLoader(data, 8, sampler=sampler, num_workers=int(rank == 1))
torch.manual_seed(100 + rank)
job = ckptd.attach(model=ddp, optimizer=optimizer)
job.vars(seen=0.0, step=0)
out = job.open(f"losses-{rank}.txt")
for epoch in job.loop(range(3)):
    sampler.set_epoch(epoch)
    for x, y in job.loop(loader):
        # Not reduced at every second batch.
        whole = job.vars.step % 2 == 1
        with nullcontext() if whole else ddp.no_sync():
            noise = random.random() * 1e-3 * np.random.rand()
            loss = nn.functional.cross_entropy(ddp(x + noise), y)
            loss.backward()
        if whole:
            optimizer.step()
            optimizer.zero_grad()
        job.vars.seen += loss.item()
        job.vars.step += 1
        out.write(f"{loss.item().hex()}\n")
        if rank == 0:
            print("step", job.vars.step, flush=True)
        go_wrong(str(job.vars.step))
    ddp.eval()
    if not only_first:
        for i in job.loop(range(4), on_resume="restart"):
            with torch.no_grad():
                job.vars.seen += ddp.module(torch.randn(4, 40)).sum().item()
            go_wrong(f"{epoch}e{i}")
    elif rank == 0:
        for i in job.loop(range(4)):
            go_wrong(f"{epoch}e{i}")
    dist.barrier()
    ddp.train()
digest = hashlib.sha256()
states = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
for tensor in (*ddp.state_dict().values(), *states):
    digest.update(tensor.numpy().tobytes())
Path(f"final-{rank}.txt").write_text(f"{digest.hexdigest()} {job.vars.seen.hex()}\n")
dist.destroy_process_group()
