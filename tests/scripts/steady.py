"""A training of 200 steps: steady.py RESULT SECONDS, so many seconds a step."""

import sys
import time
from pathlib import Path

from small import Training

import ckptd


def main():
    training, pace_s = Training(), float(sys.argv[2])
    for _ in training.job.loop(range(200)):
        training.step()
        time.sleep(pace_s)
    training.write(Path(sys.argv[1]))


if __name__ == "__main__":
    ckptd.seed_everything(5)
    main()
