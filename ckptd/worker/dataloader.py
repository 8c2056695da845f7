"""A DataLoader that can be put back to batch k, exactly and without loading a sample twice.

Theory of operation. A plain `DataLoader` can't say where it is, and the random streams of its
worker processes live and die with them. So the loop iterates over a second loader, made from the
public attributes of the user's, that draws the same numbers in the same order but differs in four
parts:

- its *collate function* sends, beside each batch, what changed in the random states of the worker
  that made it. The states after the last batch that was *consumed* are thus known for every
  worker; what prefetched batches did to a worker's generators is forgotten with them;
- its *batch sampler*, when resuming, drops the first k index lists, and before them hands out
  `k mod num_workers` empty ones: batches are dealt to workers in turn, and batch k must be made by
  the worker that would have made it;
- its *dataset* is the user's behind a thin face that makes nothing of an empty index list;
- its *worker_init_fn* calls the user's, then shields the worker from signals to the process group,
  and, when resuming, sets the worker's generators to the states that were carried.

Only index generation is repeated, from the generators as they were at the loop's entry, so the
cost of resuming does not grow with what a sample costs. Prefetched batches that were never
consumed are made again, identically.

In workers, an `IterableDataset` is asked for batches by the same machinery: an index list then says
whose turn it is. The state of a dataset that has `state_dict` travels with each batch. Of one that
has none, the batches are made again from the begin of the round, and dropped.

*Persistent workers* go on from round to round, and three things follow. A round that was left early
is *settled* before their states count: what they had prefetched has moved their generators. The
seed that they were started with is drawn again from the state that it was drawn from. And only a
loader's first round asks its sampler twice.

With `num_workers=0` nothing has to be sent: the process's own generators are captured anyway, and
the user's own loader is iterated over; a dataset that is replayed finds the random streams as it
found them (`tape`).
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import os
import signal
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeGuard

import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, MapDataPipe, Sampler

from ckptd.errors import CannotCarryError, LoopChangedError
from ckptd.worker import rng, tree
from ckptd.worker.feeds import (
    TAPE_BYTES_MAX,
    Feed,
    Replay,
    find_generators,
    generator_at,
    length_of,
    replay_taped,
    set_generator,
)
from ckptd.worker.tape import Tape
from ckptd.worker.tree import Frozen, Json

#: Generators that the script named, by name: looked for in loader workers too, where a dataset uses
#: them as globals of its module.
tracked: dict[str, Any] = {}


class WorkerStates:
    """One loader worker as of its last consumed batch.

    Attributes:
        packed: its global streams (`rng.Packer`).
        hidden: other generators, by path.
        given: whether it has given a batch in the current round.
        ended: whether it has nothing left in the current round (iterable datasets).
        dataset: what its dataset's `state_dict` gave, where it has one.
    """

    def __init__(self) -> None:
        self.packed: list[bytes | None] = [None, None, None]
        self.hidden: dict[str, Json] = {}
        self.given = False
        self.ended = False
        self.dataset: Any = None

    def merge(self, sent: _Sent) -> None:
        """Take over what came with a batch."""
        for i, state in enumerate(sent.changed):
            if state is not None:
                self.packed[i] = rng.patched(self.packed[i], state)
        if sent.hidden is not None:
            self.hidden = sent.hidden
        self.given = True
        self.ended = sent.ended
        self.dataset = sent.dataset

    def as_values(self) -> list[Any]:
        """As plain values for a checkpoint."""
        return [*self.packed, self.hidden, self.given, self.ended, self.dataset]

    @classmethod
    def from_values(cls, values: Sequence[Any]) -> WorkerStates:
        """What `as_values` gave."""
        states = cls()
        states.packed = list(values[:3])
        states.hidden, states.given, states.ended, states.dataset = values[3:]
        return states


class LoaderFeed(Feed):
    """An ordinary DataLoader."""

    kind = "DataLoader"

    def __init__(self, loader: DataLoader[Any], say: Callable[[str], None] | None = None) -> None:
        if not getattr(loader, "in_order", True):
            raise CannotCarryError(
                "a DataLoader with in_order=False hands out batches in the order of arrival, "
                "which no resumed run can repeat; use in_order=True"
            )
        self.loader = loader
        self.length = length_of(loader)
        self.likeness = likeness_of(loader)
        self._say = say or _say_here
        self._shared = _shared_of(loader)
        self._over = False  # whether its dataset has ended (without workers)
        self._stateful = _is_iterable(loader) and _is_stateful(loader.dataset)
        self._replayed = _is_iterable(loader) and not self._stateful
        self._tape = Tape(TAPE_BYTES_MAX, self._say)
        for path, owner, state in self._owned(self.states()):
            _sightings.sight(owner, path, state, iterated=self._shared.rounds > 0)

    def shares(self, other: LoaderFeed) -> set[str]:
        """Where this loader and another one have the same generators, by path."""
        theirs = find_generators(other.roots())
        mine = find_generators(self.roots())
        return {path for path, one in mine.items() if theirs.get(path) is one}

    def is_that_of(self, likeness: str, hidden: dict[str, Json]) -> bool:
        """Whether it looks like a loader of the interrupted process, as found by its first loop."""
        if likeness != self.likeness:
            return False
        states = self.states()
        return states.keys() == hidden.keys() and all(
            _digest(state) == hidden[path]["first"] for path, state in states.items()
        )

    @property
    def used(self) -> bool:
        """Whether this process has iterated over the loader: then it knows best where that is."""
        return self._shared.opened > 0

    @property
    def _open(self) -> bool:
        """Whether the loader's current round is this feed's."""
        return self._shared.open_feed() is self

    def fresh(self) -> Iterator[Any]:
        self._shared.opened_by(self)
        if self.loader.num_workers == 0:
            self._shared.rounds += 1
            if self._stateful:
                return self._stateful_here()
            return (
                self._taped(iter(self.loader), 0, self._shared.opened)
                if self._replayed
                else iter(self.loader)
            )
        return self._consume(self._shared.iterate(0, 0, None), self._shared.opened)

    def resume(self, done: int, position: Any, reset: Callable[[], None]) -> Iterator[Any]:
        loader, shared = self.loader, self._shared
        if position["workers"] != loader.num_workers:
            raise LoopChangedError(
                f"a DataLoader had {position['workers']} workers when the job was interrupted, it "
                f"has {loader.num_workers} now: their random streams can't be continued"
            )
        shared.forget()
        shared.rounds = position["rounds"] - position["open"]
        if loader.num_workers == 0:
            return self._resume_here(done, position)
        again = loader.persistent_workers and shared.rounds > 0
        if done == 0 and not again:
            return self.fresh()
        self._shared.opened_by(self)
        shared.seed = position["seed"]
        shared.states, shared.begun = _states_of(position["states"]), position["begun"]
        if self._replayed and position["open"]:
            shared.states = _states_of(shared.begun)
            iterator = shared.iterate(0, 0, reset if again else None)
            batches = self._consume(iterator, shared.opened)
            return Replay(loader, self._say).drop(batches, done)
        turn = position["turn"] if done else 0
        skipped = 0 if _is_iterable(loader) else done
        # Persistent workers drew their base seed in the first round; here it is drawn again, so
        # the sampler must find the generators as if it had not been.
        batches = shared.iterate(skipped, turn, reset if again else None, middle=done > 0)
        for _ in range(turn):
            # Now: each empty batch taken has the sampler asked for one more, as far ahead as it was
            # at the interruption, and what it draws is overwritten at the resume point.
            next(batches)
        return self._consume(batches, shared.opened)

    def _resume_here(self, done: int, position: Any) -> Iterator[Any]:
        """In this process, without workers."""
        if self._stateful:
            dataset: Any = self.loader.dataset
            dataset.load_state_dict(position["dataset"])
            return iter(()) if position["over"] else self.fresh()
        if done == 0:
            return self.fresh()
        self._shared.opened_by(self)
        self._shared.rounds += 1
        if self._replayed:
            iterator = iter(self.loader)
            replay_taped(
                self._tape, position["tape"], iterator, done, Replay(self.loader, self._say)
            )
            return self._taped(iterator, done, self._shared.opened)
        batches = _Batches(self.loader, done, 0, None)
        iterator = iter(_remade(self.loader, batches, None, _Items(self.loader, {})))
        # Here and now, and not at the first `next`: a sampler draws its seed when it is first
        # asked, and by then the generators will have been set to the resume point's state.
        batches.skip()
        return iterator

    def _taped(self, iterator: Iterator[Any], done: int, number: int) -> Iterator[Any]:
        try:
            yield from self._tape.record(iterator, done)
        finally:
            self._shared.leave(number)

    def _stateful_here(self) -> Iterator[Any]:
        """A dataset that knows its position, in this process; whether it has ended is kept too."""
        batches = _Batches(self.loader, 0, 0, None)
        self._over = False
        remade = _remade(self.loader, batches, None, _Items(self.loader, {}))
        return self._noted(iter(remade), self._shared.opened)

    def _noted(self, batches: Iterator[Any], number: int) -> Iterator[Any]:
        try:
            for sent in batches:
                self._over = sent.ended
                if not sent.empty:
                    yield sent.batch
                if self._over:
                    return
        finally:
            self._shared.leave(number)

    def position(self) -> Frozen:
        shared = self._shared
        shared.settle_if_left()
        dataset: Any = self.loader.dataset
        here = self._stateful and self.loader.num_workers == 0
        value = {
            "workers": self.loader.num_workers,
            "rounds": shared.rounds,
            "open": int(self._open),
            "over": self._over and self._open,
            "turn": shared.turn,
            "seed": shared.seed,
            "states": {str(k): v.as_values() for k, v in shared.states.items()},
            "begun": {str(k): v for k, v in shared.begun.items()},
            "dataset": dataset.state_dict() if here else None,
            "tape": self._tape.position(),
        }
        return tree.freeze(value, "the DataLoader's workers")

    def roots(self) -> dict[str, Any]:
        loader = self.loader
        own = {
            "generator": loader.generator,
            "sampler": loader.sampler,
            "batch_sampler": loader.batch_sampler,
        }
        return {**own, **_worker_roots(loader.dataset, loader.collate_fn)}

    # What belongs to a loader is adopted by a resumed process at the first loop over it, and by
    # then the script may have set it: `sampler.set_epoch(epoch)`, `generator.manual_seed(epoch)`.
    # So each state carries a digest of the one that the first loop found. A resumed process that
    # finds another one than that has set it itself; and so has one that found the first one again
    # in a later loop.

    def hidden(self) -> dict[str, Json]:
        return {
            path: _sightings.noted(owner, path, state)
            for path, owner, state in self._owned(self.states())
        }

    def worker_streams(self) -> dict[str, Any]:
        """Each worker's random states as of its last consumed batch, by a name for people."""
        found: dict[str, Any] = {}
        for worker, states in sorted(self._shared.states.items()):
            for name, state in zip(("`random`", "numpy", "torch"), states.packed, strict=True):
                found[f"worker {worker}'s {name} stream"] = state
            found |= {f"worker {worker}'s `{k}`": v for k, v in states.hidden.items()}
        return found

    def set_hidden(self, states: dict[str, Json]) -> None:
        super().set_hidden(states)
        self._remember(states)

    def adopt_hidden(
        self, states: dict[str, Json], restored: dict[int, object], existing: Existing | None = None
    ) -> None:
        made = None if existing is None or self.loader in existing else existing
        now = {path: (owner, state) for path, owner, state in self._owned(self.states())}
        untouched = {}
        for path, state in states.items():
            owner, found = now.get(path, (None, None))
            as_first = found is None or _digest(found) == state["first"]
            if as_first and not state["again"] and (made is None or owner in made):
                untouched[path] = state
        super().adopt_hidden(untouched, restored)
        self._remember(states)

    def _remember(self, states: dict[str, Json]) -> None:
        for path, owner, state in self._owned(states):
            _sightings.remember(owner, path, state)

    def _owned(self, states: dict[str, Json]) -> list[tuple[str, object, Json]]:
        """Each state with the generator that has it; of a counter, the sampler."""
        roots = self.roots()
        found = find_generators(roots)
        return [
            (path, found.get(path, roots.get(path.partition(".")[0])), state)
            for path, state in states.items()
        ]

    def _consume(self, batches: Iterator[Any], number: int) -> Iterator[Any]:
        """Unwrap what the workers sent; keep their states as of what was consumed."""
        shared = self._shared
        try:
            for sent in batches:
                shared.take(sent)
                if not sent.empty:
                    yield sent.batch
        finally:
            shared.leave(number)


class _Shared:
    """What all feeds over one user's loader share: the loader that carries, and its states.

    Persistent workers live as long as their loader, so the carrying loader must live as long as the
    user's, over all loops that use it.

    Attributes:
        rounds: how often the loader was iterated over.
        states: each worker as of its last consumed batch.
        begun: the same as of the current round's begin.
        turn: the worker whose turn it is.
        seed: the generator's state from which persistent workers' base seed was drawn.
        left: nobody iterates over the round that was begun last.
        opened: the rounds that were begun in this process.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = weakref.ref(loader)
        self._carrying: DataLoader[Any] | None = None
        self._batches: _Batches | None = None
        self._running: Iterator[Any] | None = None
        self.states: dict[int, WorkerStates] = {}
        self.begun: dict[int, list[Any]] = {}
        self.rounds = 0
        self.turn = 0
        self.seed: Json = None
        self.left = False
        self.opened = 0
        self._feed: weakref.ref[LoaderFeed] | None = None

    def iterate(
        self, done: int, turn: int, reset: Callable[[], None] | None, *, middle: bool = False
    ) -> Iterator[Any]:
        """Begin a round, or go on in its middle.

        Args:
            done: so many index lists are dropped.
            turn: so many empty ones are handed out first.
            reset: given when workers that had persisted are made again.
            middle: the round was begun by the interrupted process.
        """
        loader = self._loader()
        assert loader is not None, "the feed holds the user's loader"
        self._settle()
        anew = self._carrying is None or not loader.persistent_workers
        if anew and not middle and reset is None:
            self.states.clear()
        if not middle:
            for one in self.states.values():
                one.given = one.ended = False
            self.begun = {k: v.as_values() for k, v in self.states.items()}
        if anew:
            states = {k: v.as_values() for k, v in self.states.items()}
            init = _Init(loader.worker_init_fn, loader.collate_fn, states)
            self._batches = _Batches(loader, 0, 0, None)
            self._carrying = _remade(loader, self._batches, init, _Items(loader, states))
        assert self._batches is not None, "made with the loader that carries"
        assert self._carrying is not None, "the same"
        self.rounds += 1
        self.turn = turn
        self._batches.begin_at(done, turn, reset, self)
        running = iter(self._carrying)
        # Not held where workers end with their iterator, as they do when a loop is left.
        self._running = running if loader.persistent_workers else None
        return running

    def forget(self) -> None:
        """What this process did with the loader does not count: it is put back."""
        self._carrying = self._batches = self._running = None

    def opened_by(self, feed: LoaderFeed) -> None:
        """A round is begun."""
        self._feed, self.left = weakref.ref(feed), False
        self.opened += 1

    def leave(self, number: int) -> None:
        """The `number`th round that was begun in this process is over; a later one may not be."""
        self.left = self.left or number == self.opened

    def open_feed(self) -> LoaderFeed | None:
        """Whose the current round is; None between rounds."""
        return None if self._feed is None or self.left else self._feed()

    def take(self, sent: _Sent) -> None:
        """A batch was consumed, or a worker has said that it has no more."""
        self.states.setdefault(sent.worker, WorkerStates()).merge(sent)
        loader = self._loader()
        assert loader is not None, "the feed holds the user's loader"
        self.turn = (sent.worker + 1) % loader.num_workers
        ended = [worker for worker, states in self.states.items() if states.ended]
        if len(ended) == loader.num_workers:
            assert self._batches is not None, "a round runs"
            self._batches.stop()

    def settle_if_left(self) -> None:
        """Settle the last round if nobody iterates over it."""
        if self.left:
            self._settle()

    def _settle(self) -> None:
        """What persistent workers had prefetched when their round was left moved their generators.

        They make it in any case, before they turn to the next round. No new work is given out.
        """
        running, self._running = self._running, None
        loader = self._loader()
        if running is None or loader is None or not loader.persistent_workers:
            return
        assert self._batches is not None, "a round runs"
        self._batches.stop()
        try:
            for sent in running:
                self.take(sent)
        except Exception as error:  # noqa: BLE001  # an unwanted batch's; a plain loader drops it
            _say_here(f"a prefetched batch that nobody asked for failed: {error}")


class _Sightings:
    """How the first loop over it found each generator and counter, as a digest.

    Args:
        most: so many are remembered; they are kept alive, so that a new one is not taken for them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[tuple[int, str], tuple[object, str, bool]] = {}

    def sight(self, owner: object, name: str, state: Json, *, iterated: bool) -> None:
        """A loop is begun, and finds this."""
        digest, key = _digest(state), (id(owner), name)
        _, first, again = self._known.get(key, (owner, digest, False))
        self._known[key] = owner, first, again or (iterated and first == digest)
        while len(self._known) > self._most:
            del self._known[next(iter(self._known))]

    def noted(self, owner: object, name: str, state: Json) -> Json:
        """A state with what is known of it."""
        _, first, again = self._known.get((id(owner), name), (owner, None, False))
        return {**state, "first": first, "again": again}

    def remember(self, owner: object, name: str, state: Json) -> None:
        """What the interrupted process had noted."""
        if state["first"] is not None:
            self._known[id(owner), name] = owner, state["first"], state["again"]


_sightings: Final = _Sightings(1024)

_all_shared: weakref.WeakKeyDictionary[DataLoader[Any], _Shared] = weakref.WeakKeyDictionary()


def _shared_of(loader: DataLoader[Any]) -> _Shared:
    if loader not in _all_shared:
        _all_shared[loader] = _Shared(loader)
    return _all_shared[loader]


class Existing:
    """What was there at the resume point: only that can be what the interrupted process had.

    What the script makes after it, it makes as an uninterrupted run would.
    """

    def __init__(self) -> None:
        objects = gc.get_objects()
        self._owners: weakref.WeakSet[Any] = weakref.WeakSet()
        for one in objects:
            if _is_owner(one):
                self._owners.add(one)
        held = [*gc.get_referents(*objects), *_in_running_functions()]
        self._generators = {id(one): one for one in held if issubclass(type(one), rng.GENERATORS)}

    def loaders(self) -> list[DataLoader[Any]]:
        """The loaders among it."""
        return [one for one in self._owners if carries(one)]

    def __contains__(self, one: object) -> bool:
        return id(one) in self._generators or (_is_owner(one) and one in self._owners)


def _in_running_functions() -> list[object]:
    """The local variables of the functions that are running, which the collector does not see."""
    found: list[object] = []
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001  # `inspect` would read sources
    while frame is not None:
        names = frame.f_locals
        found += [one for one in names.values() if issubclass(type(one), rng.GENERATORS)]
        if type(names) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            # A copy that the frame would go on holding; a loop that is left has to end at once.
            names.clear()
        frame = frame.f_back
    return found


def _is_owner(one: object) -> bool:
    # `isinstance` would ask proxies.
    return issubclass(type(one), DataLoader | Sampler)


def likeness_of(loader: DataLoader[Any]) -> str:
    """What tells a loader from the script's others, also in a later process."""
    types = type(loader.dataset).__qualname__, type(loader.sampler).__qualname__
    counts = length_of(loader.dataset), loader.batch_size, loader.num_workers
    return repr((*types, *counts, loader.persistent_workers))


def carries(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether this is a loader whose iteration is that of `DataLoader` itself."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterDataPipe | MapDataPipe)
    )


def _is_iterable(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _is_stateful(dataset: object) -> bool:
    methods = ("state_dict", "load_state_dict")
    return all(callable(getattr(dataset, method, None)) for method in methods)


def _states_of(values: dict[Any, Any]) -> dict[int, WorkerStates]:
    return {int(worker): WorkerStates.from_values(one) for worker, one in values.items()}


def _digest(state: Json) -> str:
    kept = {k: v for k, v in state.items() if k not in ("first", "again")}
    return xxhash.xxh3_64_hexdigest(json.dumps(kept, sort_keys=True).encode())


def _say_here(text: str) -> None:
    print(f"ckptd: {text}", file=sys.stderr, flush=True)  # no supervisor is known here


def _remade(
    loader: DataLoader[Any],
    batches: Iterable[Any],
    init: Callable[[int], None] | None,
    items: _Items,
) -> DataLoader[Any]:
    """The user's loader again, with another batch sampler; carrying states where it has workers."""
    carrying = init is not None
    options: dict[str, Any] = {}
    if carrying:
        options["prefetch_factor"] = loader.prefetch_factor
        options["persistent_workers"] = loader.persistent_workers
    if loader.pin_memory_device:
        options["pin_memory_device"] = loader.pin_memory_device
    dataset: Any = items
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=_Collate(
            loader.collate_fn,
            single=loader.batch_sampler is None,
            carrying=carrying,
            told=_is_iterable(loader),
        ),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=init,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **options,
    )


class _Batches:
    """The user's batch sampler without its first `done` index lists, after some empty ones.

    For an iterable dataset, an endless row of turns, each with the number of the round.
    """

    def __init__(
        self, loader: DataLoader[Any], done: int, empty: int, reset: Callable[[], None] | None
    ) -> None:
        self._single = loader.batch_sampler is None
        self._turns = _is_iterable(loader)
        self._sampler: Iterable[Any] = (
            loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        )
        self._generator = loader.generator
        self._persistent = loader.persistent_workers
        self.begin_at(done, empty, reset, None)

    def begin_at(
        self, done: int, empty: int, reset: Callable[[], None] | None, shared: _Shared | None
    ) -> None:
        """Where the next iteration begins; `reset`: workers that had persisted are made again."""
        self._done, self._empty, self._reset, self._shared = done, empty, reset, shared
        self._left = 0
        self._asked = 0
        self._stopped = False
        self._indices: Iterator[Any] = iter(())

    def stop(self) -> None:
        """Hand out nothing more in this iteration."""
        self._stopped = True

    def __iter__(self) -> Iterator[Any]:
        # The user's sampler is asked for its iterator here and now: a DataLoader with workers asks
        # twice in its first round, and a sampler that draws when asked must be asked as often.
        self._asked += 1
        seeded = self._generator or torch.default_generator
        if self._reset is not None:
            if self._asked == 1:
                # Next, the loader draws the seed of workers that had been started in round one.
                assert self._shared is not None, "the loader that carries has one"
                if self._shared.seed is not None:
                    rng.restore(seeded, self._shared.seed)
                return iter(())
            self._reset()
        self._indices = iter(self._sampler)
        self._left = self._done
        if (
            self._persistent
            and self._shared is not None
            and self._asked == self._shared.rounds == 1
        ):
            self._shared.seed = rng.capture(seeded)
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
            yield _Nothing()
        while not self._stopped:
            if self._turns:
                yield [0 if self._shared is None else self._shared.rounds]
                continue
            try:
                index = next(indices)
            except StopIteration:
                return
            yield [index] if self._single else index


# ------------------------------------------------------------------ inside the loader's workers

_packer: Final = rng.Packer()
_patches: Final = rng.Patches()


class _Sent(NamedTuple):
    """A batch, and its worker's states after it. A tuple: a loader pins what is in tuples."""

    batch: Any
    worker: int
    changed: tuple[rng.Patch | None, ...]
    hidden: dict[str, Json] | None
    empty: bool
    ended: bool
    dataset: Any


class _Nothing(list[Any]):
    """An index list of a batch that is not wanted, and that batch's samples."""


class _Ended(list[Any]):
    """The last samples of a worker's iterable dataset in this round, or none: it has none left."""


class _Items:
    """The user's dataset as a map-style one that is always asked for a list.

    An iterable dataset is asked for its next samples, whatever the index list says; a new number in
    it begins a new round.
    """

    def __init__(self, loader: DataLoader[Any], states: dict[int, list[Any]]) -> None:
        self.dataset: Any = loader.dataset
        self._single = loader.batch_sampler is None
        self._iterable = _is_iterable(loader)
        self._size, self._drop_last = loader.batch_size, loader.drop_last
        self._collate = loader.collate_fn
        self._states = states
        self._round: int | None = None
        self._iterator: Iterator[Any] = iter(())
        self._ended = False

    def __getitems__(self, indices: Any) -> list[Any]:  # torch's name
        if isinstance(indices, _Nothing):
            return indices
        if self._iterable:
            return self._taken(indices[0])
        if self._single:
            return [self.dataset[indices[0]]]
        if getattr(self.dataset, "__getitems__", None):
            samples: list[Any] = self.dataset.__getitems__(indices)
            return samples
        return [self.dataset[index] for index in indices]

    def _taken(self, number: int) -> list[Any]:
        if number != self._round:
            again, self._round = self._round is None, number
            self._begin(self._carried() if again else None)
        samples: list[Any] = []
        wanted = 1 if self._size is None else self._size
        while len(samples) < wanted and not self._ended:
            try:
                samples.append(next(self._iterator))
            except StopIteration:
                self._ended = True
        if not samples or (self._drop_last and len(samples) < wanted):
            return _Ended()
        return _Ended(samples) if self._ended else samples

    def _carried(self) -> WorkerStates | None:
        info = torch.utils.data.get_worker_info()
        values = None if info is None else self._states.get(info.id)
        return None if values is None else WorkerStates.from_values(values)

    def _begin(self, carried: WorkerStates | None) -> None:
        if carried is not None and carried.dataset is not None:
            self.dataset.load_state_dict(carried.dataset)
        self._iterator = iter(self.dataset)
        self._ended = carried is not None and carried.ended
        if carried is not None and carried.given:
            # What `iter` drew was drawn long ago.
            _restore_worker(carried, _worker_roots(self.dataset, self._collate))


class _Collate:
    """The user's collate function, and beside its batch the states of the worker that made it."""

    def __init__(
        self, collate: Callable[[Any], Any], *, single: bool, carrying: bool, told: bool
    ) -> None:
        self._collate = collate
        self._single = single
        self._carrying = carrying
        self._told = told
        self._batches = 0
        self._paths: list[str] = []
        self._last_hidden: dict[str, Json] | None = None

    def __call__(self, samples: Any) -> Any:
        ended, empty = isinstance(samples, _Ended), isinstance(samples, _Nothing)
        if ended:
            samples, empty = list(samples), not samples
        batch = None
        if not empty:
            batch = self._collate(samples[0] if self._single else samples)
        if not self._carrying:
            none = None, None, None
            return _Sent(batch, 0, none, None, empty, ended, None) if self._told else batch
        info = torch.utils.data.get_worker_info()
        assert info is not None, "states are carried from workers only"
        dataset: Any = info.dataset
        state = None
        if isinstance(dataset, IterableDataset) and _is_stateful(dataset):
            # Copied: a queue pickles in a thread of its own, while the next batch is being made.
            state = copy.deepcopy(dataset.state_dict())  # type: ignore[attr-defined]
        changed, hidden = _patches.of(_packer.changed()), self._hidden(dataset)
        return _Sent(batch, info.id, changed, hidden, empty, ended, state)

    def _hidden(self, dataset: Any) -> dict[str, Json] | None:
        """States of generators that are not the process's own; None when nothing changed.

        They are searched for after batches 1, 2, 4, 8, …: a generator that is made lazily is made
        early, and a search at every batch would be paid by everyone.
        """
        self._batches += 1
        searching = self._batches & (self._batches - 1) == 0
        if not (searching or self._paths):
            return None  # most datasets have none, and pay nothing
        roots = _worker_roots(dataset, self._collate)
        if searching:
            self._paths = list(find_generators(roots))
        states = {}
        for path in self._paths:
            generator = generator_at(roots, path)  # looked up: it may have been replaced
            if generator is not None:
                states[path] = rng.capture(generator)
        if states == self._last_hidden:
            return None
        self._last_hidden = states
        return states


class _Init:
    """The user's worker_init_fn, then what a carried worker needs."""

    def __init__(
        self,
        init: Callable[[int], None] | None,
        collate: Callable[[Any], Any],
        states: dict[int, list[Any]],
    ) -> None:
        self._init = init
        self._collate = collate
        self._states = states

    def __call__(self, worker_id: int) -> None:
        _shield_from_group_signals()
        info = torch.utils.data.get_worker_info()
        assert info is not None, "called in a worker"
        items: Any = info.dataset
        # User code is to find the dataset that it gave; the object itself refuses assignments.
        object.__setattr__(info, "dataset", items.dataset)
        if self._init is not None:
            self._init(worker_id)
        if worker_id in self._states:
            states = WorkerStates.from_values(self._states[worker_id])
            _restore_worker(states, _worker_roots(items.dataset, self._collate))


def _restore_worker(states: WorkerStates, roots: dict[str, Any]) -> None:
    """Set this worker's generators."""
    python, numpy, torch_ = states.packed
    if python is not None and numpy is not None and torch_ is not None:
        rng.restore_packed((python, numpy, torch_))
    for path, saved in states.hidden.items():
        set_generator(roots, path, saved)


#: How far a dataset's own `dataset` (Subset) is followed to the module that it was written in.
_WRAPPED_MAX: Final = 5


def _worker_roots(dataset: Any, collate: Any) -> dict[str, Any]:
    """Where a worker's code may have generators: the objects that it has, and its globals."""
    modules = {getattr(collate, "__module__", None)}
    inner = dataset
    for _ in range(_WRAPPED_MAX):
        modules.add(type(inner).__module__)
        inner = getattr(inner, "dataset", None)
    found: dict[str, Any] = {}
    for module in sorted(name for name in modules if isinstance(name, str)):
        if module.partition(".")[0] in ("builtins", "torch", "numpy", "random"):
            continue
        for name, value in list(vars(sys.modules.get(module, object)).items()):
            if rng.is_generator(value) and value is not torch.default_generator:
                found[f"{module.replace('.', '/')}/{name}"] = value
    return {"dataset": dataset, "collate_fn": collate, "tracked": tracked, "globals": found}


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
