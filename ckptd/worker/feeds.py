"""What a loop takes its items from, and how that is put back to item k.

A `Feed` makes an iterator that draws exactly what the plain script's iterator would draw. Its
`position` is what must be known, beside the number of items that are done, to go on from there.

| iterable                           | going back to item k                                     |
|------------------------------------|----------------------------------------------------------|
| `range`, list, tuple, any sequence | by index                                                 |
| `DataLoader`                       | indices skipped, no sample loaded twice (`dataloader`)   |
| anything with `state_dict`         | its own `load_state_dict`                                |
| any other iterable                 | replay: k items are taken and dropped, which is said;    |
|                                    | each finds the random streams as it did (`tape`)         |
"""

from __future__ import annotations

import functools
import random
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ckptd.errors import LoopChangedError
from ckptd.worker import rng, tree
from ckptd.worker.tape import Tape
from ckptd.worker.tree import Frozen, Json

#: Roots whose plain attributes count too: a sampler may number its own epochs.
_SAMPLERS = {"sampler", "batch_sampler"}

#: Replaying fewer items than this is not worth a line of output.
_REPLAY_SAID_FROM = 1000
_PROGRESS_EVERY_S = 5.0

#: What is kept of the random streams of one replayed loop: some 25,000 heavily drawing items.
TAPE_BYTES_MAX = 64 << 20


class Feed(ABC):
    """The source of one loop's items.

    Attributes:
        kind: for errors, when a checkpoint was made over another kind of iterable.
        length: how many items there are; None when that can't be known.
        likeness: what tells it from others of its kind in a later process; "": nothing does.
    """

    kind: str
    length: int | None = None
    likeness = ""

    @abstractmethod
    def fresh(self) -> Iterator[Any]:
        """An iterator at the first item, begun as the plain script would begin it."""

    @abstractmethod
    def resume(self, done: int, position: Any, reset: Callable[[], None]) -> Iterator[Any]:
        """An iterator after `done` items.

        Args:
            done: the number of items that are done.
            position: what `position` gave, thawed.
            reset: sets all generators to what they were at the loop's entry. They are so when this
                is called; a feed that had to draw something else first calls it.

        Raises:
            LoopChangedError: there are fewer items than that.
        """

    def position(self) -> Frozen:
        """What must be known beside the count."""
        return Frozen(None, [])

    def roots(self) -> dict[str, Any]:
        """The objects in which random generators that belong to the iterable are looked for."""
        return {}

    def hidden(self) -> dict[str, Json]:
        """`states`, and whatever else is known of each, for `set_hidden` in a later process."""
        return self.states()

    def states(self) -> dict[str, Json]:
        """The state of those generators, and the counters of samplers, by their path."""
        roots = self.roots()
        states = {path: rng.capture(found) for path, found in find_generators(roots).items()}
        for root in _SAMPLERS & roots.keys():
            for name, value in getattr(roots[root], "__dict__", {}).items():
                if type(value) in (int, float, bool, str):
                    states[f"{root}.{name}"] = {"kind": "plain", "value": value}
        return states

    def generators(self) -> list[Any]:
        """The random generators that belong to the iterable."""
        return list(find_generators(self.roots()).values())

    def set_hidden(self, states: dict[str, Json]) -> None:
        """Set what `hidden` gave."""
        for path, state in states.items():
            set_generator(self.roots(), path, state)

    def adopt_hidden(self, states: dict[str, Json], restored: dict[int, object]) -> None:
        """The same, but only for what was not restored before; several loaders may share one.

        Args:
            states: what `hidden` gave.
            restored: the objects that were restored, by their `id`; those set here are added.
        """
        found = find_generators(self.roots())
        for path, state in states.items():
            target = found.get(path)
            if target is not None and id(target) in restored:
                continue
            set_generator(self.roots(), path, state)
        restored.update((id(target), target) for target in found.values())


class SequenceFeed(Feed):
    """Items by index."""

    kind = "sequence"

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        self.length = len(items)

    def fresh(self) -> Iterator[Any]:
        return iter(self._items)

    def resume(self, done: int, position: Any, reset: Callable[[], None]) -> Iterator[Any]:  # noqa: ARG002
        return (self._items[i] for i in range(done, len(self._items)))


class StatefulFeed(Feed):
    """An iterable that knows its own position (`state_dict`, `load_state_dict`)."""

    kind = "stateful"

    def __init__(self, items: Any) -> None:
        self._items = items
        self.length = length_of(items)

    def fresh(self) -> Iterator[Any]:
        return iter(self._items)

    def resume(self, done: int, position: Any, reset: Callable[[], None]) -> Iterator[Any]:  # noqa: ARG002
        self._items.load_state_dict(position)
        reset()
        return iter(self._items)

    def position(self) -> Frozen:
        return tree.freeze(self._items.state_dict(), "the iterable's state_dict()")


class ReplayFeed(Feed):
    """Any iterable: begun anew from the generators at the loop's entry, k items dropped.

    Each dropped item finds the process's random streams as it found them the first time (`tape`).
    """

    kind = "replay"

    def __init__(self, items: Iterable[Any], say: Callable[[str], None]) -> None:
        self._items = items
        self._say = say
        self._tape = Tape(TAPE_BYTES_MAX, say)
        self.length = length_of(items)

    def fresh(self) -> Iterator[Any]:
        self._tape = Tape(TAPE_BYTES_MAX, self._say)
        return self._tape.record(iter(self._items))

    def resume(self, done: int, position: Any, reset: Callable[[], None]) -> Iterator[Any]:  # noqa: ARG002
        if done == 0:
            return self.fresh()
        iterator = iter(self._items)
        replay_taped(self._tape, position, iterator, done, Replay(self._items, self._say))
        return self._tape.record(iterator, done)

    def position(self) -> Frozen:
        return tree.freeze(self._tape.position(), "the replayed iterable's random streams")

    def roots(self) -> dict[str, Any]:
        return {"iterable": self._items}


def replay_taped(
    tape: Tape, position: dict[str, Any], iterator: Iterator[Any], done: int, replay: Replay
) -> None:
    """Take `done` items of an iterator, each of which finds what the tape says."""
    replay.drop(_each_after(tape.replay(position), iterator), done)


def _each_after(first: Iterator[None], iterator: Iterator[Any]) -> Iterator[Any]:
    """The iterator's items, before each of which one of the first is taken."""
    while True:
        next(first)
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item


class Replay:
    """Items made again and dropped; a long one is announced, with its cost, and shows progress."""

    def __init__(self, items: object, say: Callable[[str], None]) -> None:
        self._name = type(items).__name__
        self._say = say
        self._began_s = self._said_s = time.monotonic()

    def drop(self, iterator: Iterator[Any], done: int) -> Iterator[Any]:
        """The iterator after `done` items.

        Raises:
            LoopChangedError: there are fewer.
        """
        if done >= _REPLAY_SAID_FROM:
            self._announce(done)
        for taken in range(done):
            try:
                next(iterator)
            except StopIteration:
                raise LoopChangedError(
                    f"a {self._name} had at least {done} items when the job was interrupted, "
                    f"it has {taken} now"
                ) from None
            self._progress(taken + 1, done)
        return iterator

    def _announce(self, done: int) -> None:
        self._say(
            f"a {self._name} has no position to go back to: its first {done} items are made again "
            "and dropped. Give it `state_dict` and `load_state_dict`, or iterate over a sequence, "
            "to resume without replay"
        )

    def _progress(self, taken: int, done: int) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < _PROGRESS_EVERY_S:
            return
        if done < _REPLAY_SAID_FROM and self._said_s == self._began_s:
            self._announce(done)  # few, but slow
        self._said_s = now_s
        left_s = (now_s - self._began_s) / taken * (done - taken)
        self._say(f"{self._name}: {taken} of {done} items made again, some {left_s:.0f} s left")


def length_of(items: Any) -> int | None:
    """How many items there are; None when that can't be known."""
    try:
        return len(items)
    except (TypeError, NotImplementedError):
        return None


# ------------------------------------------------------------------ generators inside objects

_DEPTH_MAX = 12
_OBJECTS_MAX = 2000
_CHILDREN_MAX = 64
_LEAVES = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray)


def find_generators(roots: dict[str, Any]) -> dict[str, Any]:
    """Random generators in the attributes of objects, by their path ("dataset.augment.rng").

    The walk is bounded: attributes of attributes up to a depth of twelve, the first 64 items of a
    container, 2,000 objects. A path is attribute names and container keys joined with dots.

    Args:
        roots: the objects to look into, by the first word of the path.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    level: list[tuple[str, Any]] = list(roots.items())
    for _ in range(_DEPTH_MAX):
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if id(value) in seen or isinstance(value, _LEAVES) or len(seen) >= _OBJECTS_MAX:
                continue
            seen.add(id(value))
            if rng.is_generator(value) and not isinstance(value, random.SystemRandom):
                found[path] = value
                continue
            below += [(f"{path}.{key}", child) for key, child in _children(value)]
        level = below
    return found


def generator_at(roots: dict[str, Any], path: str) -> Any:
    """The generator at a path that `find_generators` gave; None where there is none any more."""
    first, *names = path.split(".")
    value = roots.get(first)
    for name in names:
        value = _child(value, name)
    return value if rng.is_generator(value) else None


def set_generator(roots: dict[str, Any], path: str, saved: Json) -> bool:
    """Set the generator at a path; one that the object makes lazily is made now.

    Returns:
        False where the path leads nowhere any more.
    """
    first, *names = path.split(".")
    owner, value = None, roots.get(first)
    for name in names:
        owner = value
        value = _child(owner, name)
    if saved["kind"] == "plain":
        if owner is not None and type(value) is type(saved["value"]):
            setattr(owner, names[-1], saved["value"])
        return owner is not None
    if rng.is_generator(value) and rng.kind_of(value) == saved["kind"]:
        rng.restore(value, saved)
        return True
    if value is None and owner is not None and hasattr(owner, "__dict__"):
        setattr(owner, names[-1], rng.build(saved))
        return True
    return False


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(k), v) for k, v in list(value.items())[:_CHILDREN_MAX]]
    if isinstance(value, list | tuple):
        return [(str(i), v) for i, v in enumerate(value[:_CHILDREN_MAX])]
    if isinstance(value, type | types.ModuleType):
        return []
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        return [("__self__", value.__self__)]
    if isinstance(value, types.FunctionType):
        return _closed_over(value)
    return list(getattr(value, "__dict__", {}).items())


def _closed_over(function: types.FunctionType) -> list[tuple[str, Any]]:
    """A function's variables of the function around it: an augmentation may be a lambda."""
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not set yet
            found.append((name, cell.cell_contents))
    return found


def _child(value: Any, name: str) -> Any:
    return dict(_children(value)).get(name)
