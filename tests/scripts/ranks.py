"""Several ranks with every usual source of randomness; it is its own reference when run plainly.

    torchrun --standalone --nproc-per-node=3 ranks.py OUT                     plainly
    ckptd launch -- torchrun --standalone --nproc-per-node=3 ranks.py OUT     interrupted

Every rank writes OUT/metrics-RANK.csv and OUT/result-RANK.safetensors (weights, optimizer state,
every loss, the generators at the end), and prints "rank R at MOMENT" as it goes.

WORKERS is the number of loader workers, VARIANT the kind of model (see `models`). STRIKES says what
goes wrong: "moment@rank:what, ...", each once; see `Strikes`.
"""

import itertools
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from interruption import signal_and_see, wait_until
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import ckptd

EPOCHS, STEPS, BATCH, WIDTH = 3, 6, 2, 48
ACCUMULATED = 2
BUCKET_MB = 0.004  # about one layer


class Samples(Dataset):
    """Vectors, augmented with each of the three global streams."""

    def __len__(self):
        return STEPS * BATCH * int(os.environ["WORLD_SIZE"])

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, WIDTH) * (index % 7 + 1) / 7
        return x + 0.1 * torch.randn(WIDTH) + random.random() + float(np.random.rand()), index % 3


class Strikes:
    """What goes wrong: each strike once, in one rank, when that has come to a moment.

    TERM, INT, USR1, USR2 and HUP go to the supervisor; the rank goes on when the request that they
    lead to has arrived. "KILL", "raise", "exit", "stop" and "hang" are the rank's own end,
    "launcher" and "supervisor" that of others. "WAIT" is for an interruption from elsewhere.
    """

    def __init__(self, out, rank):
        self.out, self.rank, self.job = out, rank, None
        self.todo = []
        for number, one in enumerate(filter(None, os.environ.get("STRIKES", "").split(","))):
            moment, _, rest = one.strip().partition("@")
            who, _, what = rest.partition(":")
            if int(who) == rank:
                self.todo.append((moment, what, out / f"struck-{number}"))

    def at(self, moment):
        print(f"rank {self.rank} at {moment}", flush=True)
        for when, what, marker in self.todo:
            if when == moment and not marker.exists():
                marker.touch()
                self.strike(what)

    def strike(self, what):
        print(f"rank {self.rank} strikes: {what}", flush=True)
        if what == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "raise":
            raise RuntimeError("struck")
        elif what == "exit":
            os._exit(3)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "hang":
            while True:
                time.sleep(60)
        elif what == "busy":
            for _ in range(300):  # where signals are heard of at once, as in no collective
                time.sleep(0.01)
        elif what == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)  # the kernel's or the supervisor's signal ends it
        elif what == "WAIT":
            before = self.job.words[0]
            wait_until(lambda: self.job.words[0] != before, "an interruption", 200)
        else:
            number = signal.SIGKILL if what == "supervisor" else getattr(signal, f"SIG{what}")
            supervisor = self.job._link.supervisor_pid()
            if self.job.words[0] != self.job.answered:  # asked already
                os.kill(supervisor, number)
            else:
                signal_and_see(self.job, lambda: os.kill(supervisor, number))


def layers():
    parts = []
    for _ in range(3):
        parts += [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*parts, nn.Linear(WIDTH, 3))


class Branching(nn.Module):
    """Each step another branch is used, and the other one has no gradient."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.other = layers()[:4], layers()[4:], layers()[4:]
        self.uses = 0

    def forward(self, x):
        self.uses += self.training
        return (self.one if self.uses % 3 else self.other)(self.stem(x))


class Embedded(nn.Module):
    """Used in another order than registered, so that buckets are laid out anew."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(WIDTH, 3), layers()[:8]

    def forward(self, x):
        return self.last(self.first(x))


class Feedback:
    """What a compression left out, to be added the next time, as PowerSGD does."""

    def __init__(self):
        self.errors, self.uses = {}, 0


def compressed(state, bucket):
    """A communication hook that has a state of its own."""
    state.uses += 1
    whole = bucket.buffer()
    error = state.errors.get(bucket.index())
    if error is not None and error.shape == whole.shape:
        whole = whole + error
    sent = whole.bfloat16().float()
    state.errors[bucket.index()] = whole - sent
    work = dist.all_reduce(sent, async_op=True).get_future()
    return work.then(lambda done: done.value()[0] / dist.get_world_size())


def models(variant):
    """The modules to train, each with its wrapper."""
    options = {"bucket_cap_mb": BUCKET_MB}
    if variant == "views":
        options["gradient_as_bucket_view"] = True
    if variant == "static":
        options["static_graph"] = True
    if variant.startswith("branching"):
        return [DistributedDataParallel(Branching(), find_unused_parameters=True, **options)]
    if variant == "local buffers":
        options["broadcast_buffers"] = False
    wrapped = [DistributedDataParallel(Embedded(), **options)]
    if variant.startswith("compressed"):
        wrapped[0].register_comm_hook(Feedback(), compressed)
    if variant == "two":
        wrapped.append(DistributedDataParallel(layers(), **options))
    return wrapped


def main(out):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    variant = os.environ.get("VARIANT", "")
    torch.manual_seed(7)
    late = variant == "late"
    wrapped = [] if late else models(variant)
    plain = [Embedded()] if late else [one.module for one in wrapped]
    random.seed(7 + rank)
    np.random.seed(7 + rank)
    torch.manual_seed(7 + rank)
    model = nn.ModuleList(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, workers = Samples(), int(os.environ.get("WORKERS", "0"))
    sampler = DistributedSampler(data, seed=3)
    loader = DataLoader(data, BATCH, sampler=sampler, num_workers=workers)
    val_loader = DataLoader(data, 3 * BATCH, sampler=sampler)
    losses = []
    strikes = Strikes(out, rank)
    strikes.at("start")
    more = {}
    if variant == "compressed":
        more["hook_state"] = wrapped[0]._comm_hooks[0][1]
    job = strikes.job = ckptd.attach(model=model, optimizer=optimizer, losses=losses, **more)
    if late:
        wrapped = [DistributedDataParallel(one, bucket_cap_mb=BUCKET_MB) for one in plain]
    job.vars(best=float("inf"), total=0.0)
    metrics = job.open(out / f"metrics-{rank}.csv")
    metrics.write("epoch,loss\n")
    strikes.at("attached")

    for epoch in job.loop(range(EPOCHS)):
        sampler.set_epoch(epoch)
        model.train()
        for number, (x, y) in job.enumerate(loader):
            synced = number % ACCUMULATED == ACCUMULATED - 1
            if number % ACCUMULATED == 0:
                optimizer.zero_grad()
            total = 0.0
            for one in wrapped:
                with nullcontext() if synced or variant == "static" else one.no_sync():
                    loss = cross_entropy(one(x), y) / ACCUMULATED
                    loss.backward()
                total += loss.item()
            if synced:
                optimizer.step()
                if variant != "branching kept":
                    optimizer.zero_grad()
            losses.append(total)
            metrics.write(f"{epoch},{total.hex()}\n")
            strikes.at(f"{epoch}.{number}")
        strikes.at(f"{epoch}.end")
        model.eval()
        job.vars.total = 0.0
        with torch.inference_mode() if variant == "inference" else torch.no_grad():
            seen = itertools.count()
            mine = val_loader if rank == 0 or variant != "alone" else None
            for x, y in job.loop(mine, on_resume="restart") if mine else ():
                strikes.at(f"{epoch}.eval.{next(seen)}")
                evaluated = wrapped if variant == "branching kept" else plain
                job.vars.total += sum(cross_entropy(one(x), y) for one in evaluated).item()
        everywhere = torch.tensor(job.vars.total)
        dist.all_reduce(everywhere)
        job.vars.best = min(job.vars.best, job.vars.total, everywhere.item() / ranks)
        metrics.write(f"best,{job.vars.best.hex()}\n")
        strikes.at(f"{epoch}.done")
        dist.barrier()  # nobody is further: what is asked for here, is answered here
    strikes.at("over")

    metrics.close()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["drawn"] = torch.tensor([random.random(), np.random.rand()], dtype=torch.float64)
    tensors["torch"] = torch.rand(4)
    save_file(tensors, out / f"result-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
