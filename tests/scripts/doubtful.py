"""A training that crashes at step 15 unless it was resumed before step 14.

    python doubtful.py OUT CHECKPOINTS

Has checkpoints made at steps 8 and 14. Writes every loss and the weights to OUT.
"""

import os
import signal
import sys
from pathlib import Path

from interruption import signal_and_see, wait_until
from small import Training

OUT, CHECKPOINTS = Path(sys.argv[1]), Path(sys.argv[2])
LAUNCHED = "CKPTD_SOCKET" in os.environ


def main():
    training = Training()
    job = training.job
    resumed_at = len(training.losses)
    for step in job.loop(range(20)):
        if LAUNCHED and step == 15 and resumed_at in (0, 14):
            os.abort()
        training.step()
        if LAUNCHED and resumed_at == 0 and step in (7, 13):
            signal_and_see(job, lambda: os.kill(job._link.supervisor_pid(), signal.SIGUSR2))
        if LAUNCHED and step in (8, 14):
            pattern = f"{step:09d}*"
            wait_until(lambda: list(CHECKPOINTS.glob(pattern)), "a checkpoint")  # noqa: B023
    training.write(OUT)


if __name__ == "__main__":
    main()
