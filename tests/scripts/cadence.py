"""A training that is killed one step after it was asked for a snapshot, by nobody but the cadence.

    python cadence.py OUT

Writes every loss and the weights to OUT. Under `ckptd launch` it kills itself once.
"""

import os
import signal
import sys
from pathlib import Path

from interruption import wait_until
from small import Training

from ckptd import wire

OUT = Path(sys.argv[1])
LAUNCHED = "CKPTD_SOCKET" in os.environ
FIRST = LAUNCHED and not Path(f"{OUT}.killed").exists()


def main():
    training = Training()
    job = training.job
    for step in job.loop(range(20)):
        training.step()
        if FIRST and step == 11:
            # The safe point after this step answers.
            wait_until(lambda: job.words[wire.WORD_REQUEST] != job.answered, "a request")
        if FIRST and step == 12:
            Path(f"{OUT}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    training.write(OUT)


if __name__ == "__main__":
    main()
