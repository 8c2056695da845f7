"""Loop structures that real scripts have, each drawing from every generator wherever it can.

    python structures.py STRUCTURE OUT

Run plainly or under `ckptd launch`; with STRIKE=n the n-th `tick` of this process has the job
interrupted, with STRIKE_GROUP by a signal to its whole process group, with STRIKE_SUPERVISOR from
behind a launcher. What happens is written to OUT line by line, so that two runs can be compared.
"""

import os
import random
import signal
import subprocess
import sys
from collections import Counter, deque

import numpy as np
import psutil
import torch
from interruption import signal_and_see
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

import ckptd

STRIKE = int(os.environ.get("STRIKE", "0"))


def supervisor():
    """The supervisor's process: our parent, or the one before where a launcher stands between."""
    if not os.environ.get("STRIKE_SUPERVISOR"):
        return os.getppid()
    return psutil.Process().parent().ppid()


def strike():
    """Have the job stopped: by a signal to the supervisor, or to this process's whole group."""
    if os.environ.get("STRIKE_GROUP"):
        # This process and its loader's workers; from outside, as a scheduler does it.
        kill = ["kill", "-TERM", "--", f"-{os.getpgid(0)}"]
        subprocess.run(kill, check=True, start_new_session=True)
    else:
        os.kill(supervisor(), signal.SIGTERM)


class Run:
    """What every structure needs: draws, a trace, and a tick that may interrupt."""

    def __init__(self, job, out):
        self.job = job
        self.out = job.open(out)
        self.ticks = 0

    def draw(self):
        return f"{random.random():.17g} {np.random.rand():.17g} {torch.rand(1).item():.17g}"

    def trace(self, *what):
        print(*what, self.draw(), file=self.out)

    def tick(self):
        self.ticks += 1
        if self.ticks == STRIKE:
            signal_and_see(self.job, strike)


def nested(run):
    """Three levels, prologues and epilogues that draw, a plain loop as the innermost."""
    for a in run.job.loop(range(3)):
        run.trace("a", a)
        order = torch.randperm(4).tolist()  # a prologue's draw that the inner loop depends on
        for b in run.job.loop(order):
            run.trace("b", a, b)
            for c in run.job.loop("xy"):
                run.trace("c", a, b, c)
                run.tick()
            run.trace("end b")
        run.trace("end a")
        run.tick()
    run.trace("done")


def siblings(run):
    """Loops that follow one another, within an item and outside, with code between them."""
    run.job.vars(total=0)
    for stage in run.job.loop(["warm-up", "main"]):
        for i in run.job.loop(range(3)):
            run.job.vars.total += i
            run.trace(stage, "first", i, run.job.vars.total)
            run.tick()
        between = random.random()  # a plain variable: made again, as it was made the first time
        run.trace("between", between)
        for i in run.job.loop(range(3)):
            run.job.vars.total += 10 * i
            run.trace(stage, "second", i, run.job.vars.total, between)
            run.tick()
    run.trace("after")
    for i in run.job.loop(range(2)):
        run.trace("last", i)
        run.tick()


def breaks(run):
    """`break` out of inner loops and out of the outer one; `while` around a loop."""
    run.job.vars(rounds=0)
    while run.job.vars.rounds < 2:
        for a in run.job.loop(range(10)):
            for b in run.job.loop(range(10)):
                run.trace("b", a, b)
                run.tick()
                if random.random() < 0.4:
                    break
            if np.random.rand() < 0.3:
                break
        run.job.vars.rounds += 1
        run.trace("round", run.job.vars.rounds)


def evaluation(run):
    """Evaluations now and then, begun again when interrupted; the best of them is kept."""
    evaluate_now_and_then(run, first=0)


def late_evaluation(run):
    """The same, but the loop's first item has no evaluation in it: that it nests is found late."""
    evaluate_now_and_then(run, first=2)


def evaluate_now_and_then(run, first):
    best = torch.full((1,), float("inf"))
    run.job.track(best=best)
    for step in run.job.loop(range(9)):
        run.trace("step", step)
        run.tick()
        if step % 3 == first:
            total = torch.zeros(())
            for x in run.job.loop(range(3), on_resume="restart"):
                total += x + torch.rand(())
                run.trace("evaluate", x)
                run.tick()
            torch.minimum(best, total, out=best)
            run.trace("best", best.item())


def streams(run):
    """Two endless streams beside a loop, one of them with workers, taken at different rates."""
    labelled = DataLoader(Numbers(7), batch_size=2, shuffle=True)
    unlabelled = run.job.stream(DataLoader(Numbers(5), batch_size=2, shuffle=True, num_workers=2))
    letters = run.job.stream("abc")
    for epoch in run.job.loop(range(3)):
        for x, u in zip(run.job.loop(labelled), unlabelled):
            run.trace(epoch, x.tolist(), u.tolist())
            if random.random() < 0.5:
                run.trace(next(letters))
            run.tick()


def numbered(run):
    """job.enumerate goes on counting."""
    for epoch in run.job.loop(range(2)):
        for i, x in run.job.enumerate(DataLoader(Numbers(8), batch_size=2, shuffle=True), start=1):
            run.trace(epoch, i, x[0].tolist())
            run.tick()


def samplers(run):
    """Samplers and loaders with generators of their own, persistent workers, a dataset's rng."""
    generator = torch.Generator().manual_seed(3)
    numbers = Numbers(9, rng=np.random.default_rng(5))
    loader = DataLoader(
        numbers,
        batch_size=2,
        sampler=RandomSampler(numbers, generator=generator),
        num_workers=2,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(4),
    )
    weighted = DataLoader(numbers, sampler=WeightedRandomSampler([1.0] * 9, 4), batch_size=None)
    own = DataLoader(numbers, batch_sampler=OwnBatches(9))
    for epoch in run.job.loop(range(3)):
        for name, one in (("persistent", loader), ("weighted", weighted), ("own", own)):
            for x in run.job.loop(one):
                run.trace(epoch, name, [v.tolist() for v in x])
                run.tick()


def objects(run):
    """Everything that can be tracked beside modules: changed at every step."""
    shared = [1, 2]
    things = {
        "python": random.Random(1),
        "generator": np.random.default_rng(2),
        "legacy": np.random.RandomState(3),
        "torch_generator": torch.Generator().manual_seed(4),
        "tensor": torch.zeros(3, dtype=torch.bfloat16),
        "array": np.zeros(3),
        "counter": Counter(),
        "queue": deque(maxlen=3),
        "history": [],
        "table": {"shared": shared, 7: (1, 2.5)},
        "state": State(),
    }
    run.job.track(**things)
    for i in run.job.loop(range(6)):
        things["tensor"] += torch.rand(3, generator=things["torch_generator"]).bfloat16()
        things["array"] += things["generator"].random(3) + things["legacy"].rand()
        things["counter"][things["python"].choice("abc")] += 1
        things["queue"].append(i)
        things["history"].append((i, things["python"].random()))
        things["table"][7] = (i, float("nan"))
        shared.append(i)
        things["state"].advance()
        state = things["state"]
        run.trace(
            i,
            things["tensor"].tolist(),
            things["array"].tolist(),
            dict(things["counter"]),
            list(things["queue"]),
            things["history"],
            things["table"]["shared"],
            shared,
            state.count,
            state.rng.random(),
            state.linear.weight.tolist(),
            state.lr(),
        )
        run.tick()


def unfreezing(run):
    """Groups added to an optimizer during the run, layers unfrozen, a scheduler made late."""
    body, head = nn.Linear(3, 3), nn.Linear(3, 1)
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    run.job.track(body=body, head=head, optimizer=optimizer)
    scheduler = None
    for epoch in run.job.loop(range(5)):
        if epoch == 1:
            for parameter in body.parameters():
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": body.parameters(), "lr": 0.01})
        for i in run.job.loop(range(3)):
            loss = head(body(torch.rand(2, 3))).pow(2).mean() / 2
            loss.backward()
            if i != 1:  # gradients are accumulated over an interruption
                optimizer.step()
                optimizer.zero_grad()
            run.trace(epoch, i, loss.item(), [g["lr"] for g in optimizer.param_groups])
            run.tick()
        if epoch >= 1 and scheduler is None:  # made when it is first needed, after the inner loop
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            run.job.track(scheduler=scheduler)
        if scheduler is not None:
            scheduler.step()
            run.trace(body.weight.tolist(), scheduler.last_epoch)


class State:
    """A plain object with a counter, a generator, a module and its optimizer inside."""

    def __init__(self):
        self.count = 0
        self.rng = random.Random(8)
        self.linear = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.linear.parameters(), lr=0.1, momentum=0.9)

    def advance(self):
        self.count += 1
        self.optimizer.zero_grad()
        self.linear(torch.rand(4, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.param_groups[0]["lr"] *= 0.9

    def lr(self):
        return self.optimizer.param_groups[0]["lr"]


class Numbers(Dataset):
    """Numbers with noise of all three streams and, where given, of a generator of its own."""

    def __init__(self, n, rng=None):
        self.n, self.rng = n, rng

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        own = 0.0 if self.rng is None else self.rng.random()
        noise = random.random() + np.random.rand() + torch.rand(1).item() + own
        return torch.tensor([i + noise / 10], dtype=torch.float64)


class OwnBatches:
    """A batch sampler with a generator and an epoch counter of its own."""

    def __init__(self, n):
        self.n, self.epoch, self.rng = n, 0, np.random.RandomState(6)

    def __len__(self):
        return 3

    def __iter__(self):
        self.epoch += 1
        for _ in range(3):
            yield self.rng.choice(self.n, 1 + self.epoch % 2, replace=False).tolist()


def main():
    structure, out = globals()[sys.argv[1]], sys.argv[2]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    structure(Run(ckptd.attach(), out))


if __name__ == "__main__":
    main()
