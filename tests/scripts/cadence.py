"""A training that is killed one step after it was asked for a snapshot, by nobody but the cadence.

    python cadence.py OUT

Writes every loss and the weights to OUT. Under `ckptd launch` it kills itself once.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import ckptd
from ckptd import wire

OUT = Path(sys.argv[1])
LAUNCHED = "CKPTD_SOCKET" in os.environ
FIRST = LAUNCHED and not Path(f"{OUT}.killed").exists()


def wait_until_asked(job):
    while int(job.words[wire.WORD_REQUEST]) == job.answered:
        time.sleep(0.01)


def main():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    job = ckptd.attach(model=model, optimizer=optimizer, losses=losses)
    for step in job.loop(range(20)):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
        if FIRST and step == 11:
            wait_until_asked(job)  # the safe point after this step answers
        if FIRST and step == 12:
            Path(f"{OUT}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    bits = [p.detach().view(torch.int32).tolist() for p in model.parameters()]
    OUT.write_text(repr((losses, bits)))


if __name__ == "__main__":
    main()
