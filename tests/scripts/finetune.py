"""Fine-tuning: 99 % of the weights are frozen. A checkpoint is written after each step."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from interruption import signal_and_see
from torch import nn

import ckptd

torch.manual_seed(1)
backbone, head = nn.Linear(500, 4000), nn.Linear(4000, 5)
backbone.requires_grad_(requires_grad=False)
model = nn.Sequential(backbone, nn.ReLU(), nn.BatchNorm1d(4000, affine=False), head)
optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
checkpoints = Path(sys.argv[1])
job = ckptd.attach(model=model, optimizer=optimizer)
for step in job.loop(range(6)):
    loss = model(torch.rand(4, 500)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step:  # what was asked for in the step before is on the disk before more is asked for
        while not (checkpoints / f"{step:09d}").exists():
            time.sleep(0.01)
    signal_and_see(job, lambda: os.kill(os.getppid(), signal.SIGUSR2))
torch.save(model.state_dict(), sys.argv[2])
