"""A launched job's loop beside a bare one: seconds per item of each, in turn, as JSON to OUT."""

import json
import sys
import time
from pathlib import Path

import ckptd


def bare(n):
    began = time.perf_counter()
    for _ in range(n):
        pass
    return (time.perf_counter() - began) / n


def resumable(job, n):
    loop = iter(job.loop(range(n + 1)))
    next(loop)  # its entry, where a loop begins, is no item
    began = time.perf_counter()
    for _ in loop:
        pass
    return (time.perf_counter() - began) / n


def main():
    out, repeats, n = Path(sys.argv[1]), int(sys.argv[2]), 50_000
    job = ckptd.attach()
    pairs = [(resumable(job, n), bare(n)) for _ in range(repeats)]
    out.write_text(json.dumps(pairs))


if __name__ == "__main__":
    main()
