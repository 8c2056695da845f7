"""An epoch over a million samples, interrupted at a batch; resumed, it says when it came back.

    resume.py OUT BATCH

The first process is interrupted after BATCH batches. Later ones write to OUT the time since the
start of `ckptd launch` (its process), and leave.
"""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
from torch.utils.data import DataLoader

import ckptd

SAMPLES, BATCH = 1_000_000, 32


def main():
    out, stop = Path(sys.argv[1]), int(sys.argv[2])
    job = ckptd.attach()
    loader = DataLoader(range(SAMPLES), batch_size=BATCH, shuffle=True, collate_fn=len)
    for done, _ in job.enumerate(loader, start=1):
        if job.resumed:
            out.write_text(str(time.time() - psutil.Process(os.getppid()).create_time()))
            return
        if done == stop:
            os.kill(os.getppid(), signal.SIGTERM)
            while not job.words[0]:  # the request is there: it is answered before the next item
                time.sleep(0.001)


if __name__ == "__main__":
    main()
