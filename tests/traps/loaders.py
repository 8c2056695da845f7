"""Loader configurations, each iterated for some short epochs; every batch's bits are written down.

    python loaders.py GROUP OUT

GROUP is a number (of `matrix.group`), a name in `GROUPS`, or a row's name, for a failure's sake.
Run plainly or under `ckptd launch`; with STRIKE_AT=epoch/case/moment this process has the job
interrupted there.

All cases of a group take turns within each epoch, in one process.
"""

import functools
import itertools
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from matrix import EPOCHS, group, rows
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from interruption import signal_and_see
from structures import Run, strike

import ckptd
from ckptd.worker import dataloader

STRIKE_AT = os.environ.get("STRIKE_AT", "")
ITEMS, BATCH = 13, 2


class Visit(Run):
    """What the cases need: exact traces, and named moments at one of which this process strikes."""

    def __init__(self, job, out):
        super().__init__(job, out)
        self.case, self.struck = "", False

    def draw(self):
        drawn = random.random(), float(np.random.rand()), torch.rand(1, dtype=torch.float64).item()
        return " ".join(value.hex() for value in drawn)

    def at(self, moment):
        if f"{self.case}/{moment}" == STRIKE_AT and not self.struck:
            self.struck = True  # a sampler may be asked twice
            signal_and_see(self.job, strike)

    def over(self, loader, batches, *, leave_after=None):
        """One resumable loop over a loader with all its moments; `batches`: how many it has."""
        last = (leave_after or batches) - 1
        self.at("before")
        for i, batch in self.job.enumerate(loader):
            self.trace(self.case, i, bits(batch))
            for moment, place in (("first", 0), ("mid", batches // 2), ("last", last)):
                if i == place:
                    self.at(moment)
            if i == last and leave_after is not None:
                break


#: The visit of this process, for what strikes from inside a sampler.
visit = None


def bits(value):
    """A batch as text, bit by bit."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes().hex()
    return [bits(one) for one in value]


# ------------------------------------------------------------------ datasets

KEPT = {
    "nothing": lambda: None,
    "random.Random": lambda: random.Random(31),
    "numpy": lambda: np.random.default_rng(32),
    "torch": lambda: torch.Generator().manual_seed(33),
}


def drawn_from(generator):
    """One number of any generator."""
    if generator is None:
        return 0.0
    if isinstance(generator, torch.Generator):
        return torch.rand(1, generator=generator, dtype=torch.float64).item()
    return generator.random()


def noise(i):
    """Some of the global streams, and at some items none: a batch may leave any of them alone."""
    drawn = 0.0
    if i % 2:
        drawn += random.random()
    if i % 3:
        drawn += float(np.random.rand())
    if i % 4 == 1:
        drawn += torch.randn(1, dtype=torch.float64).item()
    return drawn


class Noisy(Dataset):
    """Numbers with noise; `seeded` is what a worker_init_fn gives each worker's copy."""

    def __init__(self, keeps="nothing", items=ITEMS):
        self.rng, self.items = KEPT[keeps](), items
        self.seeded = None

    def __len__(self):
        return self.items

    def __getitem__(self, i):
        own = drawn_from(self.rng) + drawn_from(self.seeded)
        return torch.tensor([i, noise(i), own], dtype=torch.float64)


def seed_from_torch(worker):
    """The usual worker_init_fn: numpy from torch's seed, a generator for the worker's dataset."""
    np.random.seed(torch.initial_seed() % 2**32)
    info = get_worker_info()
    info.dataset.seeded = np.random.default_rng([info.seed, worker])


# ------------------------------------------------------------------ samplers


class Striking:
    """Strikes while a loader's iterator is being made."""

    def __iter__(self):
        visit.at("begin")
        return super().__iter__()


class Shuffled(Striking, RandomSampler):
    pass


class Weighted(Striking, WeightedRandomSampler):
    pass


class Picked(Striking, SubsetRandomSampler):
    pass


class Distributed(Striking, DistributedSampler):
    pass


class OwnBatches:
    """A batch sampler with a numpy RandomState and an epoch counter of its own."""

    def __init__(self):
        self.rng, self.epoch = np.random.RandomState(6), 0

    def __len__(self):
        return 7

    def __iter__(self):
        visit.at("begin")
        self.epoch += 1
        return (self.rng.choice(ITEMS, 1 + (self.epoch + i) % 3).tolist() for i in range(7))


def made(row):
    """The loader of a row of the matrix, and how many batches it has."""
    workers, persistent = row.workers
    dataset = Noisy(row.keeps)
    options = {"num_workers": workers, "pin_memory": row.pin}
    if workers:
        options |= {"prefetch_factor": row.prefetch, "persistent_workers": persistent}
    if row.init:
        options["worker_init_fn"] = seed_from_torch
    batches, batch_size = 7, BATCH
    if row.sampler == "shuffle":
        options["sampler"] = Shuffled(dataset)
    elif row.sampler == "generator":
        options["generator"] = generator = torch.Generator().manual_seed(8)
        options["sampler"] = Shuffled(dataset, generator=generator)
    elif row.sampler == "weighted":
        options["sampler"] = Weighted(torch.linspace(1, 2, ITEMS), 12)
        batches = 6
    elif row.sampler == "subset":
        options["sampler"] = Picked(range(1, 11), generator=torch.Generator().manual_seed(9))
        batches = 5
    elif row.sampler == "distributed":
        options["sampler"] = Distributed(Noisy(items=10), num_replicas=2, rank=0)
        batches, batch_size = 5, 1
    elif row.sampler == "own batches":
        options["batch_sampler"] = OwnBatches()
        return DataLoader(dataset, **options), batches
    elif row.sampler == "unbatched":
        options["sampler"] = Shuffled(Noisy(items=6))
        batches, batch_size = 6, None
    else:
        options |= {"sampler": Shuffled(dataset), "drop_last": True}
        batches = 6
    return DataLoader(dataset, batch_size, **options), batches


def matrix_case(row):
    loader, batches = made(row)

    def epoch(run, number):
        if row.sampler == "distributed":
            loader.sampler.set_epoch(number)
        run.over(loader, batches)

    return epoch


# ------------------------------------------------------------------ loaders and their generators


def anew():
    """A loader made in each epoch, without a generator of its own."""

    def epoch(run, number):
        run.over(DataLoader(Noisy("numpy"), BATCH, shuffle=True, num_workers=2), 7)

    return epoch


def anew_constant():
    """The same with a generator that begins anew in each epoch, and workers that would persist."""

    def epoch(run, number):
        generator = torch.Generator().manual_seed(41)
        loader = DataLoader(
            *(Noisy(), BATCH),
            shuffle=True,
            num_workers=2,
            persistent_workers=True,
            generator=generator,
        )
        run.over(loader, 7)

    return epoch


def anew_shared():
    """A loader made in each epoch over a dataset and a generator that are made once."""
    dataset, generator = Noisy("torch"), torch.Generator().manual_seed(42)

    def epoch(run, number):
        run.over(DataLoader(dataset, BATCH, shuffle=True, generator=generator), 7)

    return epoch


def reseeded():
    """A loader made once, whose generator the script seeds before each epoch."""
    generator = torch.Generator()
    loader = DataLoader(Noisy(), BATCH, shuffle=True, num_workers=1, generator=generator)

    def epoch(run, number):
        generator.manual_seed(100 + number)
        run.over(loader, 7)

    return epoch


def twice():
    """One loader in two loops of each epoch."""
    dataset = Noisy("random.Random")
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=2, persistent_workers=True)

    def epoch(run, number):
        for batch in run.job.loop(loader):
            run.trace(run.case, "first loop", bits(batch))
        run.over(loader, 7)

    return epoch


def spawned():
    """Workers that import the script anew."""
    options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "spawn"}
    loader = DataLoader(Global("numpy"), BATCH, shuffle=True, **options)

    def epoch(run, number):
        run.over(loader, 7)

    return epoch


# ------------------------------------------------------------------ generators off the beaten path

#: Of the module, and nobody names it to ckptd.
module_rng = np.random.default_rng(51)


class Global(Noisy):
    """Draws from a generator that is a global of its module."""

    def __getitem__(self, i):
        return super().__getitem__(i) + module_rng.random()


class Jitter(torch.nn.Module):
    """A transform, written as such are: a module."""

    def __init__(self):
        super().__init__()
        self.rng = random.Random(52)

    def forward(self, x):
        return x + self.rng.random()


class Compose:
    """Transforms one after another."""

    def __init__(self, *transforms):
        self.transforms = list(transforms)

    def __call__(self, x):
        return functools.reduce(lambda made, transform: transform(made), self.transforms, x)


class Transformed(Noisy):
    """Items passed through a transform; asked for by lists, never by an empty one."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def __getitems__(self, indices):
        assert indices, "nobody asked for a batch of nothing"
        return [self.transform(self[i]) for i in indices]


class Mixing:
    """A collate function that draws."""

    def __init__(self):
        self.rng = torch.Generator().manual_seed(53)

    def __call__(self, samples):
        return torch.stack(samples) * torch.rand(1, generator=self.rng, dtype=torch.float64)


def transformed():
    """A generator deep inside a transform of the dataset, of a subset of it."""
    dataset = Subset(Subset(Transformed(Compose(Compose(Jitter()))), range(13)), range(1, 13))
    return plainly(DataLoader(dataset, BATCH, shuffle=True, num_workers=2), 6)


def closed_over():
    """A generator that only a lambda knows."""
    rng = np.random.default_rng(54)
    dataset = Transformed(lambda x: x + rng.random())
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    return plainly(loader, 7)


def collating():
    """A generator of the collate function, and another bound to it."""
    partial = functools.partial(mixed, rng=random.Random(55), more=Mixing())
    loader = DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2, collate_fn=partial)
    return plainly(loader, 7)


def mixed(samples, rng, more):
    return more(samples) + rng.random()


def module_global():
    """A generator that is a global of the dataset's module."""
    return plainly(DataLoader(Global(), BATCH, shuffle=True, num_workers=2), 7)


class Classy(Noisy):
    """Draws from a generator where nobody looks, but that was named to ckptd."""

    rng_of_all = random.Random(56)

    def __getitem__(self, i):
        return super().__getitem__(i) + self.rng_of_all.random()


def tracked():
    """A generator that the main process named, used by workers."""
    dataloader.tracked["rng_of_all"] = Classy.rng_of_all
    return plainly(DataLoader(Classy(), BATCH, shuffle=True, num_workers=2), 7)


def plainly(loader, batches, **options):
    return lambda run, number: run.over(loader, batches, **options)


# ------------------------------------------------------------------ left early


def left():
    """Persistent workers whose loop is left while they have prefetched."""
    options = {"num_workers": 3, "persistent_workers": True, "prefetch_factor": 2}
    loader = DataLoader(Noisy("numpy", 40), BATCH, shuffle=True, **options)
    return plainly(loader, 20, leave_after=2)


def left_at_once():
    """The same, left before each worker has given a batch."""
    options = {"num_workers": 3, "persistent_workers": True, "prefetch_factor": 1}
    loader = DataLoader(Noisy("torch", 40), BATCH, shuffle=True, **options)
    return plainly(loader, 20, leave_after=1)


def left_mortal():
    """Workers that end with their loop."""
    loader = DataLoader(Noisy("numpy", 40), BATCH, shuffle=True, num_workers=2)
    return plainly(loader, 20, leave_after=4)


def growing():
    """Persistent workers of which some had nothing to do in the first epoch."""
    batches = Growing()
    loader = DataLoader(
        Noisy("numpy"),
        batch_sampler=batches,
        num_workers=3,
        persistent_workers=True,
        worker_init_fn=seed_from_torch,
    )

    def epoch(run, number):
        batches.count = 1 + 2 * number
        run.over(loader, batches.count)

    return epoch


class Growing:
    """A batch sampler whose epochs get longer; the script says how long."""

    def __init__(self):
        self.count = 0

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([[i, i + 1] for i in range(self.count)])


# ------------------------------------------------------------------ iterables


class Stream(IterableDataset):
    """Its worker's share of some numbers, shuffled through a buffer, with noise."""

    def __init__(self, items=ITEMS):
        self.items = items
        self.rng = np.random.default_rng(61)

    def share(self):
        info = get_worker_info()
        return (0, 1) if info is None else (info.id, info.num_workers)

    def __iter__(self):
        first, step = self.share()
        buffer = []
        for i in range(first, self.items, step):
            buffer.append(i)
            if len(buffer) == 4:
                yield self.made(buffer.pop(random.randrange(4)))
        while buffer:
            yield self.made(buffer.pop(random.randrange(len(buffer))))

    def made(self, i):
        return torch.tensor([i, noise(i), self.rng.random()], dtype=torch.float64)


class Stateful(Stream):
    """The same with a position of its own; `state_dict` hands out what goes on changing."""

    def __init__(self, items=ITEMS):
        super().__init__(items)
        self.state = self.at_the_begin()

    def at_the_begin(self):
        return {"next": 0, "buffer": [], "sum": torch.zeros(2, dtype=torch.float64)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = {**state, "buffer": list(state["buffer"]), "sum": state["sum"].clone()}

    def __iter__(self):
        first, step = self.share()
        while True:
            state = self.state
            share = range(first, self.items, step)
            while state["next"] < len(share) and len(state["buffer"]) < 4:
                state["buffer"].append(share[state["next"]])
                state["next"] += 1
            if not state["buffer"]:
                break
            made = self.made(state["buffer"].pop(random.randrange(len(state["buffer"]))))
            state["sum"] += made[:2]
            yield torch.cat([made, state["sum"]])
        self.state = self.at_the_begin()


class StatefulLoader:
    """A loader that knows its own position: that after the last batch it has handed out."""

    def __init__(self, dataset, workers):
        self.loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)
        self.taken, self.skip, self.entry = 0, 0, None

    def state_dict(self):
        return {"taken": self.taken, "entry": self.entry}

    def load_state_dict(self, state):
        self.skip, self.entry = state["taken"], state["entry"]

    def __iter__(self):
        if self.skip:
            torch.set_rng_state(self.entry)
        self.entry = torch.get_rng_state()
        iterator = iter(self.loader)
        return self.batches(iterator)

    def batches(self, iterator):
        self.taken, self.skip = 0, self.skip
        for batch in iterator:
            self.taken += 1
            if self.taken > self.skip:
                yield batch
        self.taken, self.skip = 0, 0


def endless():
    """A part of an endless generator, in each epoch the next one."""

    def epoch(run, number):
        run.over(itertools.islice((number + i / 7 for i in itertools.count()), 6), 6)

    return epoch


def iterable():
    """An iterable dataset in two workers."""
    return plainly(DataLoader(Stream(), BATCH, num_workers=2), 7)


def iterable_persistent():
    """In workers that persist, with a part of a batch dropped: its items were drawn."""
    options = {"num_workers": 2, "persistent_workers": True, "drop_last": True}
    return plainly(DataLoader(Stream(), BATCH, **options), 6)


def iterable_left():
    """Left early, by workers that persist."""
    loader = DataLoader(Stream(40), BATCH, num_workers=3, persistent_workers=True)
    return plainly(loader, 20, leave_after=4)


def stateful_here():
    """A dataset that knows its position, without workers."""
    return plainly(DataLoader(Stateful(), BATCH), 7)


def stateful():
    """A dataset that knows its position, in two workers."""
    return plainly(DataLoader(Stateful(), BATCH, num_workers=2, prefetch_factor=5), 7)


def stateful_persistent():
    """In three workers that persist, item by item."""
    loader = DataLoader(Stateful(), None, num_workers=3, persistent_workers=True)
    return plainly(loader, 13)


def stateful_left():
    """Left early: it goes on there, and so it does plainly."""
    loader = DataLoader(Stateful(40), BATCH, num_workers=2, persistent_workers=True)
    return plainly(loader, 10, leave_after=3)


def own_position():
    """A loader that has `state_dict` itself."""
    return plainly(StatefulLoader(Numbers(), 2), 7)


class Numbers(Noisy):
    """Without noise."""

    def __getitem__(self, i):
        return torch.tensor([i])


def interleaved():
    """Without workers and position: its draws and the script's take turns on the same streams."""
    loader = DataLoader(Stream(), BATCH)

    def epoch(run, number):
        run.over(loader, 7)

    return epoch


GROUPS = {
    "made": (anew, anew_constant, anew_shared, reseeded, twice, spawned),
    "hidden": (transformed, closed_over, collating, module_global, tracked),
    "left": (left, left_at_once, left_mortal, growing),
    "iterable": (endless, iterable, iterable_persistent, iterable_left, interleaved),
    "stateful": (stateful_here, stateful, stateful_persistent, stateful_left, own_position),
}


def cases_of(name):
    """The cases of a group: name -> (a function of run and epoch, its moments)."""
    if name.isdigit():
        return {row.name: matrix_case(row) for row in group(int(name))}
    if name in GROUPS:
        return {case.__name__: case() for case in GROUPS[name]}
    every = [case for cases in GROUPS.values() for case in cases]
    named = {case.__name__: case for case in every if case.__name__ == name}
    return (
        {name: named[name]()}
        if named
        else {row.name: matrix_case(row) for row in rows() if row.name == name}
    )


def main():
    global visit
    warnings.simplefilter("ignore")  # of pin_memory without an accelerator, and of workers > cores
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    cases = cases_of(sys.argv[1])
    visit = Visit(ckptd.attach(), sys.argv[2])
    for epoch in visit.job.loop(range(EPOCHS)):
        for name, case in cases.items():
            visit.case = f"{epoch}/{name}"
            case(visit, epoch)
            visit.trace(visit.case, "done")
    visit.trace("end")


if __name__ == "__main__":
    main()
