"""A training that is killed when nothing is left on the disk, and in the middle of a snapshot.

    python memory.py OUT CHECKPOINTS

Writes every loss and the weights to OUT. Under `ckptd launch` it kills itself, twice.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from interruption import signal_and_see
from torch import nn
from torch.utils.data import DataLoader

import ckptd
from ckptd.worker import copies

OUT, CHECKPOINTS = Path(sys.argv[1]), Path(sys.argv[2])
LAUNCHED = "CKPTD_SOCKET" in os.environ


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def first_time(name):
    marker = Path(f"{OUT}.{name}")
    if not LAUNCHED or marker.exists():
        return False
    marker.touch()
    return True


def ask(job):
    signal_and_see(job, lambda: os.kill(job._link.supervisor_pid(), signal.SIGUSR2))


def wait_durable(step):
    while not list(CHECKPOINTS.glob(f"{step:09d}*")):
        time.sleep(0.01)


def die_within_a_copy():
    """From now on, a snapshot is half copied when the process is killed."""

    def half(self):
        for share in self._shares[: len(self._shares) // 2]:
            copies._move_all(share)
        kill()

    copies.Copies.finish = half


def main():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(8, 400), nn.Dropout(0.3), nn.Linear(400, 400), nn.Linear(400, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader([torch.full((8,), float(i)) for i in range(24)], 4, True, num_workers=1)
    losses = []
    job = ckptd.attach(model=model, optimizer=optimizer, losses=losses)
    for _ in job.loop(range(3)):
        for x in job.loop(loader):
            step = len(losses)
            optimizer.zero_grad()
            loss = model(x + torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item().hex())
            if step in (3, 9) and LAUNCHED and not Path(f"{OUT}.{step}").exists():
                ask(job)
            if step == 4 and first_time("3"):
                wait_durable(4)
                shutil.rmtree(CHECKPOINTS)
                kill()
            if step == 10 and first_time("9"):
                wait_durable(10)
                die_within_a_copy()
                ask(job)
    bits = [p.detach().view(torch.int32).tolist() for p in model.parameters()]
    OUT.write_text(repr((losses, bits)))


if __name__ == "__main__":
    main()
