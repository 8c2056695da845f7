"""A training whose state fits into the memory that it may use once, and not twice.

    python short_of_memory.py OUT

Under `ckptd launch` it asks for a checkpoint at each step, waits for it, and kills itself once.
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

OUT = Path(sys.argv[1])
LAUNCHED = "CKPTD_SOCKET" in os.environ
STEPS, KILLED_AFTER = 4, 2
SIDE = 8192  # 256 MiB of weights


def main():
    torch.manual_seed(3)
    model = nn.Linear(SIDE, SIDE, bias=False)
    losses = []
    job = ckptd.attach(model=model, losses=losses)
    checkpoints = Path("runs/job/checkpoints")
    for step in job.loop(range(STEPS)):
        with torch.no_grad():
            model.weight[step].add_(torch.randn(SIDE))
            losses.append(model.weight[: STEPS + 1].sum().item().hex())
        if not LAUNCHED:
            continue
        while step and not list(checkpoints.glob(f"{step:09d}*")):
            time.sleep(0.01)
        if step == KILLED_AFTER and not Path(f"{OUT}.killed").exists():
            Path(f"{OUT}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        signal_and_see(job, lambda: os.kill(job._link.supervisor_pid(), signal.SIGUSR2))
    OUT.write_text(repr((losses, model.weight[: STEPS + 1].view(torch.int32).tolist())))


if __name__ == "__main__":
    main()
