"""A moment: the random generators and all loose values as they were at one point of the run.

When a job resumes, the code before the resume point runs again, and it must see what it saw the
first time. So a moment is kept for the entry of every open loop, for the item that each outer loop
handed out last, and for the end of every loop that is already finished within that item.

A moment holds no big tensors: weights and optimizer state are the newest ones while the prologue
runs again, and everything is restored once more at the resume point.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from ckptd.errors import MismatchError
from ckptd.worker import rng
from ckptd.worker.feeds import Feed
from ckptd.worker.snapshot import Reader, Writer
from ckptd.worker.state import Carrier, Naming, Saved
from ckptd.worker.tree import Frozen, Json


@dataclass(frozen=True, slots=True)
class Moment:
    """What the prologue of a resumed loop must see.

    Attributes:
        generators: the process's own generators (`rng.capture_global`).
        plain: tracked object -> (its kind, its loose values).
        streams: position of every `job.stream`, by its key.
    """

    generators: dict[str, Json]
    plain: dict[str, tuple[str, Frozen]]
    streams: dict[str, StreamPosition]

    def apply(self, carriers: dict[str, Carrier], naming: Naming) -> None:
        """Set the loose values, then the generators.

        What does not fit yet is left: the script may still build it, and the resume point checks.
        """
        for name, (kind, frozen) in self.plain.items():
            carrier = carriers.get(name)
            if carrier is not None and carrier.kind == kind:
                with suppress(MismatchError):
                    carrier.restore_plain(Saved.of(kind, {"": frozen}), naming)
        rng.restore_global(self.generators)

    def entry(self, writer: Writer) -> dict[str, Json]:
        """As part of `state.json`."""
        return {
            "generators": self.generators,
            "plain": {
                name: {"kind": kind, **writer.add("loops", frozen)}
                for name, (kind, frozen) in self.plain.items()
            },
            "streams": {key: position.entry(writer) for key, position in self.streams.items()},
        }

    @classmethod
    def read(cls, reader: Reader, entry: dict[str, Json]) -> Moment:
        """What `entry` wrote."""
        return cls(
            entry["generators"],
            {name: (one["kind"], reader.frozen(one)) for name, one in entry["plain"].items()},
            {key: StreamPosition.read(reader, one) for key, one in entry["streams"].items()},
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A loop's or a stream's begin: what an iterator must find to draw the same items again.

    Attributes:
        generators: the process's own generators.
        hidden: generators that belong to the iterable (its sampler's, its dataset's), by path.
    """

    generators: dict[str, Json]
    hidden: dict[str, Json]

    @classmethod
    def of(cls, feed: Feed) -> Entry:
        """The generators as they are now."""
        return cls(rng.capture_global(), feed.hidden())

    def apply(self, feed: Feed) -> None:
        """Set the generators."""
        rng.restore_global(self.generators)
        feed.set_hidden(self.hidden)

    def entry(self) -> dict[str, Json]:
        """As part of `state.json`."""
        return {"generators": self.generators, "hidden": self.hidden}


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Where a `job.stream` is: items taken since its iterator was begun, and how to begin it again.

    `begun` is None when the current round's iterator was not begun yet. `likeness` is the feed's.
    """

    done: int
    begun: Entry | None
    feed: Frozen
    hidden: dict[str, Json]
    likeness: str

    def entry(self, writer: Writer) -> dict[str, Json]:
        """As part of `state.json`."""
        return {
            "done": self.done,
            "begun": None if self.begun is None else self.begun.entry(),
            "feed": writer.add("loops", self.feed),
            "hidden": self.hidden,
            "likeness": self.likeness,
        }

    @classmethod
    def read(cls, reader: Reader, entry: dict[str, Json]) -> StreamPosition:
        """What `entry` wrote."""
        begun = entry["begun"]
        return cls(
            entry["done"],
            None if begun is None else Entry(begun["generators"], begun["hidden"]),
            reader.frozen(entry["feed"]),
            entry["hidden"],
            entry["likeness"],
        )
