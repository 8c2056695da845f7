"""256 MiB that are saved, and restored after a crash, for who watches the supervisor."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import ckptd

MIB = 256


def main():
    run = Path(sys.argv[1])
    model = nn.ParameterList(torch.zeros(MIB * 2**20 // 4 // 16) for _ in range(16))
    job = ckptd.attach(model=model)
    for step in job.loop(range(3)):
        if not job.resumed and step == 0:
            os.kill(os.getppid(), signal.SIGUSR2)
        if not job.resumed and step == 2:
            while not (run / "checkpoints").is_dir() or not any((run / "checkpoints").glob("0*")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
