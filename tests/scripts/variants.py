"""A script that changes between two launches: VARIANT says what is different from "" in it."""

import os
import signal
import sys

import torch
from interruption import signal_and_see
from torch import nn
from torch.utils.data import DataLoader

import ckptd

VARIANT = os.environ.get("VARIANT", "")


def main():
    model = nn.ModuleDict({"body": nn.Linear(4, 5 if VARIANT == "shape" else 3)})
    if VARIANT == "unexpected":
        model["more"] = nn.Linear(1, 1)
    if VARIANT == "missing":
        del model["body"]
        model["other"] = nn.Linear(4, 3)
    if VARIANT == "dtype":
        model = model.to(torch.float64)
    kind = torch.optim.SGD if VARIANT == "optimizer" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=0.1)
    named = {"model": model, "optimizer": optimizer, "history": []}
    if VARIANT == "new name":
        named["ema"] = nn.Linear(1, 1)
    if VARIANT == "other kind":
        named["history"] = {}
    job = ckptd.attach(**named)
    print("weights", float(next(model.parameters()).sum()), flush=True)
    out = job.open("out.txt")
    data = list(range(9 if VARIANT == "length" else 8))
    items = DataLoader(data) if VARIANT == "loop kind" else data
    if VARIANT == "exception":
        raise RuntimeError(VARIANT)
    if VARIANT == "exit":
        sys.exit("the data is not mounted yet")
    if VARIANT == "finished early":
        return
    for epoch in job.loop(range(2)):
        if VARIANT == "missed" and epoch == 0:
            continue
        if VARIANT == "more loops":
            for _ in job.loop(range(1)):
                pass
        for item in job.loop(items):
            print(epoch, item, file=out)
            optimizer.step()
            if VARIANT == "" and item == 3 and os.environ.get("STRIKE"):
                signal_and_see(job, lambda: os.kill(os.getppid(), signal.SIGTERM))


if __name__ == "__main__":
    main()
