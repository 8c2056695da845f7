"""Fine-tuning with an embedding that nobody trains, though it could be: 90 % of the weights.

python embedding.py OUT CHECKPOINTS LATE

A checkpoint is written after each step. From step LATE on the embedding is trained, too.
STOP=N: SIGTERM at step N.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from interruption import signal_and_see
from torch import nn

import ckptd

STEPS = 12
out, checkpoints, late = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
stop = int(os.environ.get("STOP", "-1"))
torch.manual_seed(1)
embedding, head = nn.Embedding(20_000, 40), nn.Linear(40, 2000)
model = nn.ModuleDict({"embedding": embedding, "head": head})
optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
job = ckptd.attach(model=model, optimizer=optimizer)
for step in job.loop(range(STEPS)):
    if step == late:
        optimizer.add_param_group({"params": [embedding.weight]})
    drawn = embedding(torch.randint(0, 20_000, (8,)))
    if step < late:
        drawn = drawn.detach()
    head(drawn).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if "CKPTD_SOCKET" in os.environ:
        # what was asked for in the step before is on the disk before more is asked for
        while step and not (checkpoints / f"{step:09d}").exists():
            time.sleep(0.01)
        number = signal.SIGTERM if step == stop else signal.SIGUSR2
        signal_and_see(job, lambda number=number: os.kill(os.getppid(), number))
torch.save(model.state_dict(), out)
