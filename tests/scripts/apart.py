"""Ranks that go through loops of their own before they come to one that they all have.

In the sixth item of these, rank 0 asks for a stop, when the others are there too.
"""

import os
import signal
import time
from pathlib import Path

from interruption import wait_until

import ckptd

rank = int(os.environ["RANK"])
job = ckptd.attach()
job.vars(done=0)


def work():
    time.sleep(0.02)
    job.vars.done += 1


def stop(done):
    if done != 5 or job.resumed:
        return
    before = job.words[0]
    Path(f"here-{rank}").touch()
    if rank == 0:
        wait_until(Path("here-1").exists, "rank 1")
        os.kill(job._link.supervisor_pid(), signal.SIGTERM)
    wait_until(lambda: job.words[0] != before, "a request")


for part in job.loop(range(2)):
    if part == 1:
        for _ in job.loop(range(200)):
            work()
    elif rank == 0:
        for done in job.loop(range(30)):
            work()
            stop(done)
    else:
        for done in job.loop(range(30)):
            work()
            stop(done)
print("rank", rank, "did", job.vars.done, flush=True)
