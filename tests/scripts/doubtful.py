"""A training that crashes at step 15 unless it was resumed before step 14.

    python doubtful.py OUT CHECKPOINTS

Has checkpoints made at steps 8 and 14. Writes every loss and the weights to OUT.
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

OUT, CHECKPOINTS = Path(sys.argv[1]), Path(sys.argv[2])
LAUNCHED = "CKPTD_SOCKET" in os.environ


def main():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    job = ckptd.attach(model=model, optimizer=optimizer, losses=losses)
    resumed_at = len(losses)
    for step in job.loop(range(20)):
        if LAUNCHED and step == 15 and resumed_at in (0, 14):
            os.abort()
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
        if LAUNCHED and resumed_at == 0 and step in (7, 13):
            signal_and_see(job, lambda: os.kill(job._link.supervisor_pid(), signal.SIGUSR2))
        while LAUNCHED and step in (8, 14) and not list(CHECKPOINTS.glob(f"{step:09d}*")):
            time.sleep(0.01)
    bits = [p.detach().view(torch.int32).tolist() for p in model.parameters()]
    OUT.write_text(repr((losses, bits)))


if __name__ == "__main__":
    main()
