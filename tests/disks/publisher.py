"""Publishes checkpoints with ckptd's own store until the disk is gone.

    publisher.py RUN [FORGET]

Each step appends a line to RUN/output and publishes RUN/checkpoints/STEP, which counts on the
output's length. Prints "durable STEP" after that. FORGET names an operation that is left out: the
broken twin, which a power cut must expose.
"""

import os
import random
import sys
import time
from pathlib import Path

import msgspec

from ckptd.host.disk import RealDisk
from ckptd.store import fence, retention, store

KEEP, LARGE_EVERY = 3, 4


def forgetful(what):
    """A disk that leaves one kind of sync out."""
    disk = RealDisk()
    sync = disk.sync
    if what == "the files' sync":
        disk.sync = lambda path: None
    elif what == "the output's sync":
        disk.sync = lambda path: path.name == "output" or sync(path)
    elif what == "the directories' sync":
        disk.sync_directory = lambda path: None
    elif what == "the parent's sync":
        real = disk.sync_directory
        disk.sync_directory = lambda path: path.name == "checkpoints" or real(path)
    else:
        sys.exit(f"not an operation: {what}")
    return disk


def content(step):
    """Files whose sizes and bytes follow from the step, large ones too, and one that stays."""
    drawn = random.Random(step)
    sizes = {"model.safetensors": 150_000, "optimizer.safetensors": 90_000}
    if step % LARGE_EVERY == 0:
        sizes["large.safetensors"] = 3 << 20
    files = {name: drawn.randbytes(drawn.randint(1, most)) for name, most in sizes.items()}
    return {**files, "frozen.safetensors": bytes(60_000)}


def main():
    run = Path(sys.argv[1])
    disk = forgetful(sys.argv[2]) if len(sys.argv) > 2 else RealDisk()  # what is to be forgotten
    attempt = fence.claim(RealDisk(), run, "publisher\n")
    steps = retention.newest_first(disk.names(run / "checkpoints"))
    step = retention.order_of(steps[0])[0] if steps else 0
    output = run / "output"
    while True:
        step += 1
        with output.open("ab") as lines:
            lines.write(f"{step}\n".encode())
        state = msgspec.json.encode({"step": step, "output": output.stat().st_size})
        store.publish_attempt(
            disk,
            run,
            step=step,
            attempt=attempt,
            files={"state.json": state, **content(step)},
            outputs=[output],
            created=time.time(),
        )
        print("durable", step, flush=True)
        store.prune(disk, run / "checkpoints", KEEP)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(74)
