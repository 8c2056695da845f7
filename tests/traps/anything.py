"""Interprets a training script that was drawn at random: loops in loops, with draws everywhere.

    python anything.py PROGRAM OUT

PROGRAM is a JSON list of statements, each a list that begins with its kind:

    ["draw"]                        a line with a draw of every stream
    ["add"]                         changes a loose value, a tracked list and a tracked tensor
    ["train"]                       one step of a tracked model, optimizer and scheduler
    ["late", NAME]                  appends to a list that is tracked when it is first needed
    ["tick"]                        a moment at which the run may be interrupted
    ["break", P]                    leaves the innermost loop with probability P
    ["loop", OVER, N, BODY]         OVER: range, list, enumerate, restart, loader0, loader1
    ["zip", N, BODY]                a loop beside a stream of a loader
    ["while", N, BODY]              until a loose value of its own has counted to N

Run plainly or under `ckptd launch`, interrupted like structures.py.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from structures import Numbers, Run

import ckptd


class Script:
    def __init__(self, run):
        self.run, self.job = run, run.job
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.own = np.random.default_rng(4)
        self.history, self.tensor = [], torch.zeros(2)
        self.late = {}
        self.loaders = {
            "loader0": DataLoader(Numbers(5, random.Random(2)), batch_size=2, shuffle=True),
            "loader1": DataLoader(Numbers(5), batch_size=2, shuffle=True, num_workers=1),
        }
        self.job.track(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            own=self.own,
            history=self.history,
            tensor=self.tensor,
        )
        self.job.vars(total=0)

    def block(self, statements, path):
        """Runs statements; True: a break."""
        for number, (kind, *rest) in enumerate(statements):
            if getattr(self, f"do_{kind}")(*rest, path=f"{path}_{number}"):
                return True
        return False

    def do_draw(self, path):
        self.run.trace(path, self.own.random())

    def do_add(self, path):
        self.job.vars.total += random.randrange(5)
        self.history.append(self.job.vars.total)
        self.tensor += torch.rand(2)
        self.run.trace(path, self.job.vars.total, self.history[-3:], self.tensor.tolist())

    def do_train(self, path):
        loss = self.model(torch.rand(3, 2)).pow(2).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.run.trace(path, loss.item().hex(), self.optimizer.param_groups[0]["lr"])

    def do_late(self, name, path):
        if name not in self.late:
            self.late[name] = []
            self.job.track(**{name: self.late[name]})
        self.late[name].append(random.random())
        self.run.trace(path, self.late[name])

    def do_tick(self, path):
        self.run.tick()

    def do_break(self, chance, path):
        return random.random() < chance

    def do_while(self, n, body, path):
        name = f"count{path}"
        self.job.vars(**{name: 0})
        while getattr(self.job.vars, name) < n:
            setattr(self.job.vars, name, getattr(self.job.vars, name) + 1)
            if self.block(body, path):
                break
        setattr(self.job.vars, name, 0)

    def do_loop(self, over, n, body, path):
        for item in self.loop_over(over, n):
            self.run.trace(path, over, item)
            if self.block(body, path):
                break

    def do_zip(self, n, body, path):
        for item, other in zip(self.job.loop(range(n)), self.job.stream(self.loaders["loader0"])):
            self.run.trace(path, item, other.tolist())
            if self.block(body, path):
                break

    def loop_over(self, over, n):
        if over == "range":
            return self.job.loop(range(n))
        if over == "list":
            return self.job.loop(torch.randperm(n).tolist())
        if over == "enumerate":
            return self.job.enumerate("abc"[:n], start=n)
        if over == "restart":
            return self.job.loop(range(n), on_resume="restart")
        return self.job.loop(self.loaders[over])


def main():
    program, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    script = Script(Run(ckptd.attach(), out))
    script.block(program, "")
    script.run.trace("done", script.history, script.model[0].weight.tolist())


if __name__ == "__main__":
    main()
