"""Interprets a training script that was drawn at random: loops in loops, with draws everywhere.

    python anything.py PROGRAM OUT

PROGRAM is a JSON list of statements, each a list that begins with its kind:

    ["draw", STREAM]            a draw of random, numpy, torch or the tracked generator `own`
    ["add"]                     changes a loose value, a tracked list and a tracked tensor
    ["train"]                   one step of a tracked model, optimizer and scheduler
    ["late", NAME]              appends to a list that is tracked when it is first needed
    ["local"]                   a plain variable that the body makes anew for each item
    ["use"]                     writes down the nearest such variable
    ["next", NAME]              takes the next item of a stream that was made at the beginning
    ["break", P]                leaves the loop with probability P
    ["leave", N]                leaves the loop whenever a loose value has counted N more
    ["loop", OVER, N, BODY]     OVER: see `Script.over`
    ["zip", OVER, N, BODY]      the same beside a stream of a loader, made here
    ["while", N, HOW, BODY]     until a loose value of its own has counted to N; HOW it begins: set
                                each time, or given a first value once

Run plainly or under `ckptd launch`. OUT.strikes, where it is there, is a JSON list: each process
takes the first one away and interrupts itself so: n has it stopped when it comes to its n-th
statement, [m, n] asks for a checkpoint at the m-th and kills the process at the n-th.

OUT gets a line for each statement. OUT.seen gets the same lines, without tensors, also those of
code that runs again before the resume point: what it sees there is what it saw the first time.
"""

import hashlib
import json
import os
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from interruption import signal_and_see
from structures import Numbers

import ckptd

#: How deep loops are nested, and how many outermost statements there are, at most.
_LEVELS, _OUTERMOST = 5, 8


class Strikes:
    """Interrupts this process at the statement that its turn of OUT.strikes says."""

    def __init__(self, job, out):
        self.job, self.ticks = job, 0
        self.ask_at = self.stop_at = self.kill_at = 0
        file = Path(f"{out}.strikes")
        if not file.exists():
            return
        mine, *rest = json.loads(file.read_text()) or [0]
        file.write_text(json.dumps(rest))
        if isinstance(mine, int):
            self.stop_at = mine
        else:
            self.ask_at, self.kill_at = mine

    def tick(self):
        self.ticks += 1
        if self.ticks == self.ask_at:
            self.send(signal.SIGUSR2)
        if self.ticks == self.kill_at:
            self.kill()
        if self.ticks == self.stop_at:
            self.send(signal.SIGTERM)

    def send(self, number):
        signal_and_see(self.job, lambda: os.kill(os.getppid(), number))

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)


class LeftError(Exception):
    """The innermost loop is to be left."""


class Script:
    """One program's objects, and a method for each kind of statement."""

    def __init__(self, job, out, strikes):
        self.job, self.strikes = job, strikes
        self.out = job.open(out)
        self.seen = Path(f"{out}.seen").open("a", buffering=1)  # noqa: SIM115  # until the end
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.own = np.random.default_rng(4)
        self.history, self.tensor = [], torch.zeros(2)
        self.late = {}
        self.in_loop, self.level = False, 0
        job.track(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            own=self.own,
            history=self.history,
            tensor=self.tensor,
        )
        job.vars(total=0)
        # Each outermost statement has loaders of its own; "shared" is everybody's.
        self.loaders = [loaders(10 * number) for number in range(_OUTERMOST)]
        self.shared = loaders(10 * _OUTERMOST)["loader0"]
        self.streams = {
            "s": job.stream(DataLoader(Numbers(3, random.Random(8)), shuffle=True)),
            "t": job.stream("abc"),
        }

    def block(self, statements, path, local):
        """Runs statements; `local` are the plain variables of the item around them."""
        for number, (kind, *rest) in enumerate(statements):
            self.strikes.tick()
            getattr(self, f"do_{kind}")(*rest, path=f"{path}.{number}", local=local)

    def trace(self, path, *what, more=None):
        """Writes a line: what the statement has seen, and all that is carried as it is now.

        `more` belongs to the run, but is not seen again by code that runs again.
        """
        rate = self.optimizer.param_groups[0]["lr"]
        loose = json.dumps([self.job.vars.__dict__, self.history, rate])
        legacy = np.random.get_state()
        state = repr(
            (
                *(random.getstate(), self.own.bit_generator.state, legacy[1].tobytes(), legacy[2:]),
                torch.get_rng_state().numpy().tobytes(),
            )
        )
        line = f"{path} {' '.join(map(str, what))} {short(state)} {short(loose)}"
        if self.in_loop:
            print(line, file=self.seen)
        tensors = [self.tensor, *self.model.parameters()]
        tensors += [s for one in self.optimizer.state.values() for s in one.values()]
        bytes_ = b"".join(t.detach().numpy().tobytes() for t in tensors)
        print(line, short(repr((bytes_, more))), file=self.out)

    # -------------------------------------------------------------- statements

    def do_draw(self, stream, path, local):
        self.trace(path, self.drawn(stream))

    def drawn(self, stream):
        if stream == "random":
            return random.random().hex()
        if stream == "numpy":
            return np.random.normal().hex()
        if stream == "torch":
            return torch.randn(1).item().hex()
        return self.own.random().hex()

    def do_add(self, path, local):
        self.job.vars.total += random.randrange(5)
        self.history.append(self.job.vars.total)
        self.tensor += torch.rand(2)
        self.trace(path, "add")

    def do_train(self, path, local):
        loss = self.model(torch.rand(3, 2)).pow(2).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.trace(path, "train")

    def do_late(self, name, path, local):
        if name not in self.late:
            self.late[name] = []
            self.job.track(**{name: self.late[name]})
        self.late[name].append(random.randrange(100))
        self.trace(path, "late", more=self.late[name])

    def do_local(self, path, local):
        local["value"] = random.random().hex()
        self.trace(path, "local")

    def do_use(self, path, local):
        self.trace(path, "use", local.get("value"))

    def do_next(self, name, path, local):
        item = next(self.streams[name])
        self.trace(path, "next", item if isinstance(item, str) else bits(item))

    def do_break(self, chance, path, local):
        if np.random.rand() < chance:
            raise LeftError

    def do_leave(self, n, path, local):
        name = f"left{path.rpartition('.')[2]}"
        self.job.vars(**{name: 0})
        count = getattr(self.job.vars, name) + 1
        setattr(self.job.vars, name, count)
        if count % n == 0:
            raise LeftError

    def do_while(self, n, how, body, path, local):
        name = f"count{path.rpartition('.')[2]}"
        if how == "set":
            setattr(self.job.vars, name, 0)
        else:
            self.job.vars(**{name: 0})
        while getattr(self.job.vars, name) < n:
            setattr(self.job.vars, name, getattr(self.job.vars, name) + 1)
            try:
                self.block(body, f"{path}w{getattr(self.job.vars, name)}", dict(local))
            except LeftError:
                break

    def do_loop(self, over, n, body, path, local):
        self.run_loop(self.over(over, n, path), body, path, local)

    def do_zip(self, over, n, body, path, local):
        beside = self.job.stream(self.loader("beside", path))
        self.run_loop(zip(self.over(over, n, path), beside), body, path, local)

    def run_loop(self, items, body, path, local):
        outside = self.in_loop
        self.level += 1
        for item in items:
            self.in_loop = True
            self.job.vars.visit = self.job.vars.__dict__.get("visit", 0) + 1
            here = f"{path}#{self.job.vars.visit}"
            self.trace(here, "item", bits(item))
            try:
                self.block(body, here, dict(local))
            except LeftError:
                break
        self.level -= 1
        self.in_loop = outside

    def over(self, over, n, path):
        """What a loop goes over; the generator functions are replayed."""
        if over == "range":
            return self.job.loop(range(n))
        if over == "list":
            return self.job.loop(torch.randperm(n).tolist())
        if over == "enumerate":
            return self.job.enumerate("abc"[:n], start=n)
        if over == "numbered":
            return self.job.enumerate(self.loader("loader0", path))
        if over == "restart":
            return self.job.loop(range(n), on_resume="restart")
        if over == "evaluation":
            return self.job.loop(self.loader("loader0", path), on_resume="restart")
        if over == "silent":
            return self.job.loop(letter for letter in "abc"[:n])
        if over == "torch":
            return self.job.loop(noise(n))
        if over == "shared":
            return self.job.loop(self.shared)
        if over == "loader1":  # two rounds of one loader with workers can't be open at once
            over = f"loader1 {self.level}"
        return self.job.loop(self.loader(over, path))

    def loader(self, name, path):
        """A loader of the outermost statement that a path lies in."""
        return self.loaders[int(re.match(r"\.(\d+)", path)[1])][name]


def loaders(seed):
    """All kinds, new; those of other seeds are not alike."""
    return {
        "loader0": DataLoader(Numbers(5, random.Random(seed)), batch_size=2, shuffle=True),
        **{
            f"loader1 {level}": DataLoader(Numbers(5), batch_size=2, shuffle=True, num_workers=1)
            for level in range(_LEVELS)
        },
        "sampler": DataLoader(
            Numbers(4),
            sampler=RandomSampler(range(4), generator=torch.Generator().manual_seed(seed + 1)),
            generator=torch.Generator().manual_seed(seed + 2),
        ),
        "beside": DataLoader(Numbers(3, random.Random(seed + 3)), batch_size=2, shuffle=True),
    }


def noise(n):
    """Items that are drawn from a stream that nobody else may draw from meanwhile."""
    for _ in range(n):
        yield torch.rand(1)


def bits(item):
    """An item's bits as text."""
    if isinstance(item, torch.Tensor):
        return [float(x).hex() for x in item.flatten()]
    if isinstance(item, tuple | list):
        return [bits(one) for one in item]
    return item


def short(text):
    """A short digest."""
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def run(program, out, attached=Strikes):
    """Runs a program; `attached` makes what interrupts it."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    job = ckptd.attach()
    script = Script(job, out, attached(job, out))
    script.block(program, "", {})
    script.trace("done", script.history)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
