"""A DataLoader that can be put back to batch k, exactly and without loading a sample twice.

Theory of operation. A plain `DataLoader` can't say where it is, and the random streams of its
worker processes live and die with them. So the loop iterates over a second loader, made from the
public attributes of the user's, that draws the same numbers in the same order but differs in three
parts:

- its *collate function* sends, beside each batch, what changed in the random states of the worker
  that made it. The states after the last batch that was *consumed* are thus known for every
  worker; what prefetched batches did to a worker's generators is forgotten with them;
- its *batch sampler*, when resuming, drops the first k index lists, and before them hands out
  `k mod num_workers` empty ones: batches are dealt to workers in turn, and batch k must be made by
  the worker that would have made it;
- its *worker_init_fn* calls the user's, then shields the worker from signals to the process group,
  and, when resuming, sets the worker's generators to the states that were carried.

Only index generation is repeated, from the generators as they were at the loop's entry, so the
cost of resuming does not grow with what a sample costs. Prefetched batches that were never
consumed are made again, identically.

With `num_workers=0` nothing has to be sent: the process's own generators are captured anyway, and
the user's own loader is iterated over.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, IterableDataset

from ckptd.errors import CannotCarryError, LoopChangedError
from ckptd.worker import rng, tree
from ckptd.worker.feeds import Feed, find_generators, length_of, set_generator
from ckptd.worker.tree import Frozen, Json


class WorkerStates:
    """One loader worker's random states, as of its last consumed batch."""

    def __init__(self) -> None:
        self.packed: list[bytes | None] = [None, None, None]
        self.hidden: dict[str, Json] = {}

    def merge(self, changed: Sequence[bytes | None], hidden: dict[str, Json] | None) -> None:
        """Take over what came with a batch."""
        for i, state in enumerate(changed):
            if state is not None:
                self.packed[i] = state
        if hidden is not None:
            self.hidden = hidden

    def as_values(self) -> list[Any]:
        """As plain values for a checkpoint."""
        return [*self.packed, self.hidden]

    @classmethod
    def from_values(cls, values: Sequence[Any]) -> WorkerStates:
        """What `as_values` gave."""
        states = cls()
        states.packed, states.hidden = list(values[:3]), values[3]
        return states


class LoaderFeed(Feed):
    """An ordinary DataLoader over a map-style dataset."""

    kind = "DataLoader"

    def __init__(self, loader: DataLoader[Any]) -> None:
        if not getattr(loader, "in_order", True):
            raise CannotCarryError(
                "a DataLoader with in_order=False hands out batches in the order of arrival, "
                "which no resumed run can repeat; use in_order=True"
            )
        self.loader = loader
        self._shared = _shared_of(loader)
        self.length = length_of(loader)

    def fresh(self) -> Iterator[Any]:
        if self.loader.num_workers == 0:
            return iter(self.loader)
        return self._consume(self._shared.iterate(0, None))

    def resume(self, done: int, position: Any, reset: Callable[[], None]) -> Iterator[Any]:
        workers = self.loader.num_workers
        again = bool(position["iterated"]) and self.loader.persistent_workers
        if done == 0 and not again:
            return self.fresh()
        if workers == 0:
            sampler = _Batches(self.loader, done, 0, None)
            iterator = iter(_remade(self.loader, sampler, None))
            # Here and now, and not at the first `next`: a sampler draws its seed when it is first
            # asked, and by then the generators will have been set to the resume point's state.
            sampler.skip()
            return iterator
        if position["workers"] != workers:
            raise LoopChangedError(
                f"a DataLoader had {position['workers']} workers when the job was interrupted, "
                f"it has {workers} now: their random streams can't be continued"
            )
        states = {int(k): WorkerStates.from_values(v) for k, v in position["states"].items()}
        self._shared.states = states
        # Persistent workers drew their base seed in the first epoch; here it is drawn again, so
        # the sampler must find the generators as if it had not been.
        batches = self._shared.iterate(done, reset if again else None)
        for _ in range(done % workers):
            # Now: each empty batch taken has the sampler asked for one more, as far ahead as it was
            # at the interruption, and what it draws is overwritten at the resume point.
            next(batches)
        return self._consume(batches)

    def position(self) -> Frozen:
        shared = self._shared
        states = {str(worker): states.as_values() for worker, states in shared.states.items()}
        value = {
            "workers": self.loader.num_workers,
            "iterated": shared.iterated,
            "states": states,
        }
        return tree.freeze(value, "the DataLoader's workers")

    def roots(self) -> dict[str, Any]:
        loader = self.loader
        return {
            "generator": loader.generator,
            "sampler": loader.sampler,
            "batch_sampler": loader.batch_sampler,
            "dataset": loader.dataset,
        }

    def worker_streams(self) -> dict[str, Any]:
        """Each worker's random states as of its last consumed batch, by a name for people."""
        found: dict[str, Any] = {}
        for worker, states in sorted(self._shared.states.items()):
            for name, state in zip(("`random`", "numpy", "torch"), states.packed, strict=True):
                found[f"worker {worker}'s {name} stream"] = state
            found |= {f"worker {worker}'s `{k}`": v for k, v in states.hidden.items()}
        return found

    def _consume(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Unwrap what the workers sent; keep their states as of what was consumed."""
        states = self._shared.states
        while True:
            try:
                batch, worker, changed, hidden = next(batches)
            except StopIteration:
                return
            if worker not in states:
                states[worker] = WorkerStates()
            states[worker].merge(changed, hidden)
            yield batch


class _Shared:
    """What all feeds over one user's loader share: the loader that carries, and its states.

    Persistent workers live as long as their loader, so the carrying loader must live as long as the
    user's, over all loops that use it.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = weakref.ref(loader)
        self._carrying: DataLoader[Any] | None = None
        self._batches: _Batches | None = None
        self.states: dict[int, WorkerStates] = {}
        self.iterated = False

    def iterate(self, done: int, reset: Callable[[], None] | None) -> Iterator[Any]:
        loader = self._loader()
        assert loader is not None, "the feed holds the user's loader"
        if self._carrying is None or not loader.persistent_workers:
            if done == 0 and reset is None:
                self.states.clear()
            init = _Init(loader.worker_init_fn, {k: v.as_values() for k, v in self.states.items()})
            self._batches = _Batches(loader, 0, 0, None)
            self._carrying = _remade(loader, self._batches, init)
        assert self._batches is not None
        self._batches.begin_at(done, done % loader.num_workers, reset)
        self.iterated = True
        return iter(self._carrying)


_all_shared: weakref.WeakKeyDictionary[DataLoader[Any], _Shared] = weakref.WeakKeyDictionary()


def _shared_of(loader: DataLoader[Any]) -> _Shared:
    if loader not in _all_shared:
        _all_shared[loader] = _Shared(loader)
    return _all_shared[loader]


def carries(loader: object) -> bool:
    """Whether this is a loader whose iteration is that of `DataLoader` itself."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def _remade(
    loader: DataLoader[Any], batches: Iterable[Any], init: Callable[[int], None] | None
) -> DataLoader[Any]:
    """The user's loader again, with another batch sampler; carrying states where it has workers."""
    carrying = init is not None
    options: dict[str, Any] = {}
    if carrying:
        options["prefetch_factor"] = loader.prefetch_factor
        options["persistent_workers"] = loader.persistent_workers
    if loader.pin_memory_device:
        options["pin_memory_device"] = loader.pin_memory_device
    dataset: Any = _OneByOne(loader.dataset) if loader.batch_sampler is None else loader.dataset
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=_Collate(
            loader.collate_fn, single=loader.batch_sampler is None, carrying=carrying
        ),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=init,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **options,
    )


class _OneByOne:
    """A dataset of an unbatched loader: items are asked for one by one, as that loader does."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]


class _Batches:
    """The user's batch sampler without its first `done` index lists, after some empty ones."""

    def __init__(
        self, loader: DataLoader[Any], done: int, empty: int, reset: Callable[[], None] | None
    ) -> None:
        self._single = loader.batch_sampler is None
        self._sampler: Iterable[Any] = (
            loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        )
        self.begin_at(done, empty, reset)

    def begin_at(self, done: int, empty: int, reset: Callable[[], None] | None) -> None:
        """Where the next iteration begins."""
        self._done, self._empty, self._reset = done, empty, reset
        self._left = 0
        self._indices: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        # The user's sampler is asked for its iterator here and now: a DataLoader with workers asks
        # twice, and a sampler that draws when it is asked must be asked as often.
        if self._reset is not None:
            self._reset()
        self._indices = iter(self._sampler)
        self._left = self._done
        return self._handed_out(self._indices, self._empty)

    def skip(self) -> None:
        """Drop the first index lists of the iteration that was begun last."""
        while self._left:
            try:
                next(self._indices)
            except StopIteration:
                raise LoopChangedError(
                    f"a DataLoader's sampler gave at least {self._done} batches when the job was "
                    f"interrupted, it gives {self._done - self._left} now"
                ) from None
            self._left -= 1

    def _handed_out(self, indices: Iterator[Any], empty: int) -> Iterator[Any]:
        self.skip()
        for _ in range(empty):
            yield []
        for index in indices:
            yield [index] if self._single else index


# ------------------------------------------------------------------ inside the loader's workers

_packer: Final = rng.Packer()


class _Collate:
    """The user's collate function, and beside its batch the states of the worker that made it."""

    def __init__(self, collate: Callable[[Any], Any], *, single: bool, carrying: bool) -> None:
        self._collate = collate
        self._single = single
        self._carrying = carrying
        self._batches = 0
        self._paths: dict[str, Any] = {}
        self._last_hidden: dict[str, Json] | None = None

    def __call__(self, samples: Any) -> Any:
        empty = isinstance(samples, list) and not samples
        batch = None if empty else self._collate(samples[0] if self._single else samples)
        if not self._carrying:
            return batch
        info = torch.utils.data.get_worker_info()
        assert info is not None, "states are carried from workers only"
        return batch, info.id, _packer.changed(), self._hidden(info.dataset)

    def _hidden(self, dataset: Any) -> dict[str, Json] | None:
        """States of the dataset's own generators; None when nothing changed.

        The dataset is searched after batches 1, 2, 4, 8, …: a generator that is made lazily is made
        early, and a search at every batch would be paid by everyone.
        """
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:
            self._paths = find_generators({"dataset": _user_dataset(dataset)})
        states = {path: rng.capture(generator) for path, generator in self._paths.items()}
        if states == self._last_hidden:
            return None
        self._last_hidden = states
        return states


class _Init:
    """The user's worker_init_fn, then what a carried worker needs."""

    def __init__(self, init: Callable[[int], None] | None, states: dict[int, list[Any]]) -> None:
        self._init = init
        self._states = states

    def __call__(self, worker_id: int) -> None:
        _shield_from_group_signals()
        if self._init is not None:
            self._init(worker_id)
        if worker_id not in self._states:
            return
        states = WorkerStates.from_values(self._states[worker_id])
        python, numpy, torch_ = states.packed
        if python is not None and numpy is not None and torch_ is not None:
            rng.restore_packed((python, numpy, torch_))
        info = torch.utils.data.get_worker_info()
        assert info is not None, "called in a worker"
        for path, saved in states.hidden.items():
            set_generator({"dataset": _user_dataset(info.dataset)}, path, saved)


def _user_dataset(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, _OneByOne) else dataset


def _shield_from_group_signals() -> None:
    """Let a worker survive SIGTERM and SIGINT to the process group; its own loader may end it.

    A scheduler that signals the whole group would otherwise kill the loader's workers, and with
    them the step that the main process is about to finish. SIGTERM is blocked and waited for in a
    thread, since only so its sender is seen: the parent's is obeyed (that is how DataLoader and
    multiprocessing end a worker), everybody else's is not.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent_only, args=(os.getppid(),), daemon=True).start()


def _obey_parent_only(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
