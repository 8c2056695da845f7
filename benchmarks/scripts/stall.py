"""How long a snapshot holds up the training, beside one copy of the same bytes; as JSON to OUT."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import ckptd

MIB = 64


def main():
    out, repeats = Path(sys.argv[1]), int(sys.argv[2])
    model = nn.ParameterList(torch.zeros(MIB * 2**20 // 4 // 16) for _ in range(16))
    copy = [torch.empty_like(p) for p in model]
    job = ckptd.attach(model=model)
    pairs = []
    asked_s = None
    for _ in job.loop(range(repeats + 1)):
        if asked_s is not None:
            stalled = time.perf_counter() - asked_s
            began = time.perf_counter()
            for target, source in zip(copy, model, strict=True):
                target.copy_(source.detach())
            pairs.append((stalled, time.perf_counter() - began))
        before = job.words[0]
        os.kill(os.getppid(), signal.SIGUSR2)
        while job.words[0] == before:
            time.sleep(0.001)
        asked_s = time.perf_counter()
    out.write_text(json.dumps(pairs))


if __name__ == "__main__":
    main()
