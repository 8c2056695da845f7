"""Resumable loops: where the safe points are, and how a position is found again.

Rules:

1. Between two items of a loop is a *safe point*; its entry and its exhaustion are safe points too.
   Only there is a request answered and state captured.
2. A loop is known by its place: the how-manieth loop it is within the current item of the loop
   around it. A position is the chain of open loops, outermost first, each with the number of items
   done.
3. To resume, the script runs from its first line. Loops that were finished are skipped; each outer
   loop hands out the item it was in, with generators and loose values as they were then; at the
   innermost one everything is restored again, and it goes on with the next item.
4. A loop with `on_resume="restart"` is begun again: within it, the state that stands for the job
   is the one at its entry, of which a snapshot is sent before the loop begins.
5. The hot path is `_items`: between two items, with nothing asked, one integer of shared memory is
   read and two are written. What must be kept for a loop that contains others (rule 3) is captured
   per item only in loops that have contained one.

A loop that turns out to contain another only at a later item (an evaluation every 1,000 steps) has
no record of that item's begin. For the rest of that one item there is no safe point: a request is
answered when the item is done.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple, Protocol

from torch.utils.data import DataLoader

from ckptd import wire
from ckptd.agree import Position
from ckptd.errors import CannotCarryError, LoopChangedError, ResumePointMissedError
from ckptd.worker import callsite, dataloader, feeds, rng
from ckptd.worker.feeds import Feed
from ckptd.worker.moments import Entry, Moment, StreamPosition
from ckptd.worker.snapshot import Reader, Writer
from ckptd.worker.state import Saved
from ckptd.worker.tree import Frozen, Json

#: How many finished sibling loops' ends are remembered within one item (rule 3).
_FINISHED_MAX: Final = 256


class Host(Protocol):
    """What the loops need of the job they belong to."""

    words: memoryview
    answered: int

    def moment(self) -> Moment:
        """Generators and loose values as they are now."""

    def apply(self, moment: Moment) -> None:
        """Set generators and loose values."""

    def answer(self) -> None:
        """Take a snapshot for the request on the page; may end the process."""

    def send_snapshot(self, *, keep: bool) -> int:
        """Send a snapshot that nobody asked for; its generation. `keep`: until `drop_snapshot`."""

    def drop_snapshot(self) -> None:
        """The kept snapshot does not stand for the job any more."""

    def restore_everything(self) -> None:
        """At the resume point: check, then restore all that is tracked."""

    def targets(self) -> list[object]:
        """The tracked objects."""

    def say(self, text: str) -> None:
        """Tell a person."""


class Frame:
    """One open loop."""

    __slots__ = (
        "children",
        "done",
        "entry",
        "feed",
        "finished",
        "handed",
        "handed_feed",
        "handed_hidden",
        "nests",
        "ordinal",
        "pending",
        "phase",
        "restart",
        "standing",
        "surely_nests",
        "where",
    )

    def __init__(self, feed: Feed, ordinal: int, *, restart: bool, where: str) -> None:
        self.feed = feed
        self.ordinal = ordinal
        self.restart = restart
        self.where = where
        self.phase = "entry"
        self.done = 0
        self.entry: Entry | None = None
        self.pending: Frozen | None = None  # where the feed is to be put, and is not yet
        self.handed: Moment | None = None
        self.handed_feed: Frozen | None = None
        self.handed_hidden: dict[str, Json] = {}
        self.nests = True  # until an item without a loop in it shows otherwise
        self.surely_nests = False
        self.children = 0
        self.finished: dict[int, Moment] = {}
        self.standing = 0  # a restart loop's snapshot


class Root(Frame):
    """The script itself, as the item in which the outermost loops stand."""

    def __init__(self) -> None:
        super().__init__(feeds.SequenceFeed(()), 0, restart=False, where="")


class SavedLoop:
    """One level of a checkpoint's position."""

    def __init__(self, reader: Reader, record: dict[str, Json]) -> None:
        self.ordinal: int = record["ordinal"]
        self.kind: str = record["kind"]
        self.length: int | None = record["length"]
        self.where: str = record["where"]
        self.phase: str = record["phase"]
        self.done: int = record["done"]
        self.hidden: dict[str, Json] = record["hidden"]
        self.feed = reader.frozen(record["feed"])
        handed, handed_feed, entry = record["handed"], record["handed_feed"], record["entry"]
        self.handed = None if handed is None else Moment.read(reader, handed)
        self.handed_feed = None if handed_feed is None else reader.frozen(handed_feed)
        self.handed_hidden: dict[str, Json] = record["handed_hidden"]
        self.entry = None if entry is None else Entry(entry["generators"], entry["hidden"])
        self.finished = {
            int(ordinal): Moment.read(reader, moment)
            for ordinal, moment in record["finished"].items()
        }


class SavedLoader(NamedTuple):
    """What is known of a loader of the interrupted process that this one has not found yet."""

    likeness: str
    hidden: dict[str, Json]
    feed: Frozen


class Loops:
    """All resumable loops and streams of one job.

    Attributes:
        step: items of innermost loops that are done, restart loops not counted.
        plan: the levels of the position that are still to be found again; empty: not resuming.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._stack: list[Frame] = [Root()]
        self.step = 0
        self.plan: list[SavedLoop] = []
        self._streams: dict[str, Stream] = {}
        self._saved_streams: dict[str, StreamPosition] = {}  # of streams that are made later
        self._loaders: dict[str, dataloader.LoaderFeed] = {}
        self._made_anew: dict[str, set[str]] = {}  # the generators that outlived the last loader
        self._restored: dict[int, object] = {}
        # The open loops that were found again, and what belongs to them at the resume point.
        self._rejoined: list[tuple[Feed, dict[str, Json]]] = []
        self._saved_loaders: dict[str, SavedLoader] = {}
        self._places: list[str] = []  # of all loaders and streams that were saved
        # Loops that were over, and the loaders that were there when they were skipped.
        self._skipped: dict[str, weakref.WeakSet[DataLoader[Any]]] = {}
        # Positions of loaders that were found by `_find_skipped`, until they are used.
        self._found: weakref.WeakKeyDictionary[DataLoader[Any], Frozen] = (
            weakref.WeakKeyDictionary()
        )
        self._existing: dataloader.Existing | None = None  # when the resume point was reached

    # -------------------------------------------------------------- what the script calls

    def loop(self, items: Iterable[Any], *, restart: bool, numbered: int | None) -> Iterator[Any]:
        """A generator over the items; see `Job.loop` and `Job.enumerate`."""
        where = callsite.where()
        return self._run(items, restart=restart, numbered=numbered, where=where)

    def stream(self, items: Iterable[Any]) -> Stream:
        """An endless iterator whose position is carried; see `Job.stream`."""
        place = self._place()
        number = sum(key.startswith(f"{place}/") for key in self._streams)
        key = f"{place}/{number}"
        # Within an item of a loop the same stream is made once per item: the newest one counts.
        live = self._streams.get(f"{place}/0")
        if live is not None and live.item != self._item():
            for stale in [k for k in self._streams if k.startswith(f"{place}/")]:
                del self._streams[stale]
            key = f"{place}/0"
        self._streams[key] = stream = Stream(self._feed(items), self._item())
        stream.adopt(self._saved_streams.pop(key, None), self._restored)
        return stream

    # -------------------------------------------------------------- one loop

    def _run(
        self, items: Iterable[Any], *, restart: bool, numbered: int | None, where: str
    ) -> Iterator[Any]:
        parent = self._stack[-1]
        ordinal = parent.children
        parent.children += 1
        saved = self._saved_for(parent, ordinal, where)
        if saved == "skip":
            self._skip(parent, ordinal, items)
            return
        frame = Frame(self._feed(items), ordinal, restart=restart, where=where)
        self._stack.append(frame)
        self._note_loader(self._place(), frame.feed)
        try:
            yield from self._begun(frame, parent, saved, numbered)
        finally:
            self._leave(frame, parent)

    def _begun(
        self, frame: Frame, parent: Frame, saved: SavedLoop | None, numbered: int | None
    ) -> Iterator[Any]:
        words, level = self._host.words, min(len(self._stack) - 2, wire.LOOPS_MAX - 1)
        slot = wire.WORD_LOOPS + wire.LOOP_WORDS * level
        words[slot + 1], words[slot + 2] = frame.feed.length or 0, int(frame.restart)
        words[slot + 3] = frame.ordinal
        words[slot] = 0 if saved is None else saved.done
        words[wire.WORD_DEPTH] = level + 1
        if saved is None:
            iterator: Iterator[Any] | None = self._enter(frame, None)
        else:
            iterator = self._reenter(frame, saved)
        if iterator is not None:
            if numbered is None:
                yield from self._items(frame, iterator, slot)
            else:
                for item in self._items(frame, iterator, slot):
                    yield numbered + frame.done, item
        frame.phase, frame.handed = "end", None
        self._end_restart(frame)
        if not self._inside_restart() and isinstance(parent, Root) and not self.plan:
            self._host.send_snapshot(keep=False)
        self._answer()

    def _items(self, frame: Frame, iterator: Iterator[Any], slot: int) -> Iterator[Any]:
        """The hot path: everything here runs between two batches."""
        host, stack = self._host, self._stack
        words, take = host.words, iterator.__next__
        counts = not self._inside_restart()
        handed_again = bool(self.plan)
        looking = self.plan  # empty but in the item that is handed out again
        if handed_again:
            self.plan.pop(0)
        frame.phase = "item"
        while True:
            if handed_again:
                handed_again = False
            else:
                if words[0] != host.answered:
                    self._answer()
                if frame.nests:
                    frame.handed, frame.handed_feed = host.moment(), frame.feed.position()
                    frame.handed_hidden = frame.feed.hidden()
                frame.children = 0
                if frame.finished:
                    frame.finished = {}
            try:
                item = take()
            except StopIteration:
                return
            yield item
            if looking:
                if self.plan:
                    raise self._missed(frame)
                looking = []
            if stack[-1] is not frame:
                self._cut(frame)
            frame.done += 1
            words[slot] = frame.done
            if frame.children:
                frame.nests = frame.surely_nests = True
                words[wire.WORD_DEPTH] = len(stack) - 1
            else:
                if not frame.surely_nests:
                    frame.nests, frame.handed = False, None
                if counts:
                    self.step += 1
                    words[1] = self.step

    def _enter(self, frame: Frame, saved: SavedLoop | None) -> Iterator[Any]:
        """Begin a loop at its first item; `saved`: again, after an interruption at its entry."""
        # A loader that is seen for the first time after a resume goes on where it was left.
        position = self._adopt(self._place(), frame.feed) if saved is None else saved.feed
        frame.entry, frame.pending = Entry.of(frame.feed), position
        if frame.restart and not self._inside_restart(below=frame) and not self._blind():
            frame.standing = self._host.send_snapshot(keep=True)
        self._answer()
        frame.pending = None
        if position is None:
            return frame.feed.fresh()
        return frame.feed.resume(0, _thawed(position), lambda: self._reset(frame))

    def _reenter(self, frame: Frame, saved: SavedLoop) -> Iterator[Any] | None:
        """Go back to where a loop was; None: it had nothing left."""
        innermost = len(self.plan) == 1
        self._saved_loaders.pop(self._place(), None)  # this level's own record is the newer one
        frame.finished = dict(saved.finished)
        if innermost and saved.phase != "item":
            self._restore_here(frame, saved)
            if saved.phase == "entry":
                return self._enter(frame, saved)
            frame.done = saved.done
            return None
        self._check_same(frame, saved)
        frame.entry, frame.done = saved.entry, saved.done
        self._reset(frame)
        position = saved.feed if innermost else saved.handed_feed
        assert position is not None, "an outer loop's item was recorded when it was handed out"
        iterator = frame.feed.resume(saved.done, _thawed(position), lambda: self._reset(frame))
        if innermost:
            self._restore_here(frame, saved)
            return iterator
        assert saved.handed is not None, "the same"
        frame.handed, frame.handed_feed = saved.handed, saved.handed_feed
        frame.handed_hidden = saved.handed_hidden
        frame.nests = frame.surely_nests = True
        self._host.apply(saved.handed)
        frame.feed.set_hidden(saved.handed_hidden)
        self._rejoined.append((frame.feed, saved.hidden))
        return iterator

    def _restore_here(self, frame: Frame, saved: SavedLoop) -> None:
        """The resume point: everything is what it was, and the plan is done."""
        self._host.restore_everything()
        self._rejoined.append((frame.feed, saved.hidden))
        known = self._host.targets()
        for feed, hidden in self._rejoined:
            feed.set_hidden(hidden)
            known += feed.generators()
        self._rejoined = []
        known += [one for stream in self._streams.values() for one in stream.generators()]
        self._restored.update((id(target), target) for target in known)
        self._existing = dataloader.Existing() if self._saved_loaders else None
        self._find_skipped()
        self.plan = []

    def _find_skipped(self) -> None:
        """Give loaders what is theirs whose loops lie in a loop that is over; see `_skip`.

        No such loop is begun again, but a later one may go over the same loader. It is known by
        what it is like, if it was there before that loop and still is, and is the only one.
        """
        saved: dict[str, SavedLoader | StreamPosition] = {
            **self._saved_loaders,
            **self._saved_streams,
        }
        theirs: dict[dataloader.LoaderFeed, dict[str, SavedLoader | StreamPosition]] = {}
        for over, loaders in self._skipped.items():
            found = [dataloader.LoaderFeed(loader, self._host.say) for loader in loaders]
            for place, one in saved.items():
                like = [feed for feed in found if feed.is_that_of(one.likeness, one.hidden)]
                if _lies_in(place, over) and len(like) == 1:
                    theirs.setdefault(like[0], {})[place] = one
        for feed, records in theirs.items():
            hidden = next(iter(records.values())).hidden
            if all(one.hidden == hidden for one in records.values()):
                feed.adopt_hidden(hidden, self._restored)
                for place in records.keys() & self._saved_loaders.keys():
                    self._found[feed.loader] = self._saved_loaders.pop(place).feed

    def _leave(self, frame: Frame, parent: Frame) -> None:
        """Exhausted, broken out of, or left by an exception: the loop is over."""
        if frame not in self._stack or sys.is_finalizing():
            return
        self._end_restart(frame)
        del self._stack[self._stack.index(frame) :]
        self._host.words[wire.WORD_DEPTH] = len(self._stack) - 1
        if self.plan:
            return
        try:
            parent.finished[frame.ordinal] = self._host.moment()
        except CannotCarryError as error:
            # A generator that is being closed can't raise; the next safe point will, for the same
            # reason, and names the object again.
            self._host.say(str(error))
        while len(parent.finished) > _FINISHED_MAX:
            del parent.finished[next(iter(parent.finished))]

    def _end_restart(self, frame: Frame) -> None:
        """The snapshot of a restart loop's entry stands for the job only within the loop."""
        if frame.standing:
            frame.standing = 0
            self._host.drop_snapshot()
        frame.restart = False

    def _skip(self, parent: Frame, ordinal: int, items: Iterable[Any]) -> None:
        """A loop that was finished before the interruption: only its end is made to be again."""
        place = f"{self._place()}.{ordinal}" if len(self._stack) > 1 else str(ordinal)
        feed = self._feed(items)
        self._note_loader(place, feed)
        if any(_lies_in(one, place) for one in self._places):
            self._skipped[place] = weakref.WeakSet(dataloader.Existing().loaders())
        position = self._adopt(place, feed)
        if position is not None:  # for when a loop over it is begun
            self._saved_loaders[place] = SavedLoader(feed.likeness, {}, position)
        moment = parent.finished.get(ordinal)
        if moment is not None:
            self._host.apply(moment)

    def _cut(self, frame: Frame) -> None:
        """Inner loops that nobody iterates over any more (their iterator is still referenced)."""
        for stale in self._stack[self._stack.index(frame) + 1 :]:
            self._end_restart(stale)
        del self._stack[self._stack.index(frame) + 1 :]

    # -------------------------------------------------------------- finding the position again

    def begin_resuming(
        self, reader: Reader, position: dict[str, Json], streams: Iterable[str]
    ) -> None:
        """Take over a checkpoint's position; the script has not opened a loop yet.

        Args:
            reader: the checkpoint.
            position: what `record` gave.
            streams: the keys of `stream_positions`.
        """
        self.plan = [SavedLoop(reader, record) for record in position["levels"]]
        self.step = position["step"]
        self._host.words[wire.WORD_STEP] = self.step
        self._saved_loaders = {
            place: SavedLoader(record["likeness"], record["hidden"], reader.frozen(record["feed"]))
            for place, record in position["loaders"].items()
        }
        self._places = [*self._saved_loaders, *streams]
        self._stack[0].finished = {
            int(ordinal): Moment.read(reader, moment)
            for ordinal, moment in position["finished"].items()
        }

    def _saved_for(
        self, parent: Frame, ordinal: int, where: str
    ) -> SavedLoop | Literal["skip"] | None:
        if not self.plan:
            return None
        saved = self.plan[0]
        if ordinal < saved.ordinal:
            return "skip"
        if ordinal > saved.ordinal:
            raise self._missed(parent, where)
        return saved

    def _missed(self, frame: Frame, where: str | None = None) -> ResumePointMissedError:
        saved = self.plan[0]
        here = f"the loop at {where} was opened" if where else f"an item of {frame.where} ended"
        return ResumePointMissedError(
            f"the job was interrupted in the loop at {saved.where}, and {here} without coming to "
            "it again: a branch was not taken that was taken the first time. What decides about "
            "it must be tracked (`job.vars`), so that it is the same when the script runs again."
        )

    def _check_same(self, frame: Frame, saved: SavedLoop) -> None:
        feed = frame.feed
        if feed.kind != saved.kind:
            raise LoopChangedError(
                f"the loop at {frame.where} went over a {saved.kind} when the job was interrupted, "
                f"it goes over a {feed.kind} now. Nothing was changed."
            )
        if feed.length != saved.length:
            raise LoopChangedError(
                f"the loop at {frame.where} had {_items(saved.length)} when the job was "
                f"interrupted, {saved.done} of them done; it has {_items(feed.length)} now. Give "
                "it the same data, or start over with `ckptd launch --fresh`. Nothing was changed."
            )

    def _reset(self, frame: Frame) -> None:
        """Set all generators to what they were at the loop's entry."""
        assert frame.entry is not None, "a loop that is gone back to was entered"
        frame.entry.apply(frame.feed)

    def _note_loader(self, place: str, feed: Feed) -> None:
        """Remember the loader of a place: its generators go on while no loop over it is open."""
        if isinstance(feed, dataloader.LoaderFeed):
            before = self._loaders.get(place)
            if before is not None and before.loader is not feed.loader:
                # The script makes it there: nothing of it goes on but what it is made from.
                self._made_anew[place] = before.shares(feed)
            self._loaders[place] = feed

    def _adopt(self, place: str, feed: Feed) -> Frozen | None:
        """Set what belongs to a place's loader to what was saved, once; and where it was."""
        saved = self._saved_loaders.pop(place, None)
        if not isinstance(feed, dataloader.LoaderFeed):
            return None
        if saved is None and not feed.used and feed.loader not in self._found:
            self._warn_of_others(feed)
        feed.adopt_hidden({} if saved is None else saved.hidden, self._restored, self._existing)
        position = self._found.pop(feed.loader, None if saved is None else saved.feed)
        # One that was made after the resume point was made in each item before it, too.
        made = self._existing is not None and feed.loader not in self._existing
        return None if made or feed.used else position

    def _warn_of_others(self, feed: dataloader.LoaderFeed) -> None:
        """A loader may be one that a loop that is over went over, and others may be it as well."""
        for place, one in self._saved_loaders.items():
            like = one.hidden and feed.is_that_of(one.likeness, one.hidden)
            if like and any(_lies_in(place, over) for over in self._skipped):
                self._host.say(
                    "two DataLoaders are alike, and a loop that is over used one of them: which "
                    "one can't be told. If a later loop goes over it again, track its random "
                    "generator (`job.track(sampling=generator)`), else its order may be wrong"
                )
                return

    def restore_streams(self, positions: dict[str, StreamPosition]) -> None:
        """Put every stream to its position; one that has none starts over."""
        for key, stream in self._streams.items():
            stream.put_back(positions.get(key))
        self._saved_streams = {k: p for k, p in positions.items() if k not in self._streams}

    # -------------------------------------------------------------- recording the position

    def record(self, writer: Writer) -> dict[str, Json]:
        """The position, as part of `state.json`."""
        open_frames = self.open_frames()
        return {
            "step": self.step,
            "finished": _moments(self._stack[0].finished, writer),
            "levels": [
                self._record_frame(frame, writer, innermost=frame is open_frames[-1])
                for frame in open_frames
            ],
            "loaders": self._record_loaders(writer),
        }

    def _record_loaders(self, writer: Writer) -> dict[str, Json]:
        """Every loader's generators and workers; of those not used again yet, what was saved."""
        positions = {place: saved.feed for place, saved in self._saved_loaders.items()}
        hidden = {place: saved.hidden for place, saved in self._saved_loaders.items()}
        likeness = {place: saved.likeness for place, saved in self._saved_loaders.items()}
        for place, feed in self._loaders.items():
            hidden[place], likeness[place] = feed.hidden(), feed.likeness
            if place in self._made_anew:
                outlived = self._made_anew[place]
                hidden[place] = {k: v for k, v in hidden[place].items() if k in outlived}
            if feed.used or place not in positions:  # else what was saved is still to be adopted
                positions[place] = feed.position()
        return {
            place: {
                "likeness": likeness[place],
                "hidden": hidden[place],
                "feed": writer.add("loops", position),
            }
            for place, position in positions.items()
        }

    def _record_frame(self, frame: Frame, writer: Writer, *, innermost: bool) -> dict[str, Json]:
        handed = None if innermost else frame.handed
        handed_feed = None if innermost else frame.handed_feed
        return {
            "ordinal": frame.ordinal,
            "kind": frame.feed.kind,
            "length": frame.feed.length,
            "where": frame.where,
            "phase": frame.phase if innermost else "item",
            "done": frame.done,
            "entry": None if frame.entry is None else frame.entry.entry(),
            "handed": None if handed is None else handed.entry(writer),
            "handed_feed": None if handed_feed is None else writer.add("loops", handed_feed),
            "handed_hidden": {} if innermost else frame.handed_hidden,
            "hidden": frame.feed.hidden(),
            "feed": writer.add("loops", frame.pending or frame.feed.position()),
            "finished": {} if innermost else _moments(frame.finished, writer),
        }

    def open_frames(self) -> list[Frame]:
        """The open loops, outermost first."""
        return self._stack[1:]

    def stream_positions(self) -> dict[str, StreamPosition]:
        """Where every stream is."""
        live = {key: stream.position() for key, stream in self._streams.items()}
        return {**self._saved_streams, **live}

    # -------------------------------------------------------------- safe points

    def position(self) -> Position:
        """Where this rank is, as the others understand it."""
        return tuple((frame.ordinal, frame.done) for frame in self._stack[1:])

    def described(self) -> str:
        """The same for a person, and exactly: two ranks are at one place if this is the same."""
        open_frames = self.open_frames()
        if not open_frames:
            return "before the first loop"
        levels = [f"{one.where} #{one.ordinal}, {_items(one.done)} done" for one in open_frames]
        return f"{' > '.join(levels)} ({open_frames[-1].phase})"

    @property
    def standing(self) -> int:
        """The snapshot that stands for the job within a restart loop; 0: not within one."""
        return next((frame.standing for frame in self._stack if frame.standing), 0)

    def _answer(self) -> None:
        """Answer a request, if there is one and this is a safe point; else a later one will."""
        asked = self._host.words[wire.WORD_REQUEST] != self._host.answered
        if asked and not self.plan and not self._blind():
            self._host.answer()

    def _blind(self) -> bool:
        """Whether an outer loop's item has no record of its begin."""
        return any(frame.handed is None for frame in self._stack[1:-1])

    def _inside_restart(self, below: Frame | None = None) -> bool:
        return any(frame.restart for frame in self._stack if frame is not below)

    def _place(self) -> str:
        return ".".join(str(frame.ordinal) for frame in self._stack[1:])

    def _item(self) -> tuple[int, ...]:
        return tuple(frame.done for frame in self._stack[1:])

    def _feed(self, items: Any) -> Feed:
        if isinstance(items, Sequence):
            return feeds.SequenceFeed(items)
        if dataloader.carries(items):
            return dataloader.LoaderFeed(items, self._host.say)
        methods = ("state_dict", "load_state_dict")
        if all(callable(getattr(items, method, None)) for method in methods):
            return feeds.StatefulFeed(items)
        return feeds.ReplayFeed(items, self._host.say)


class Stream:
    """An endless iterator over an iterable, begun anew whenever it ends; lazy.

    It draws as `while True: yield from iterable` does.
    """

    def __init__(self, feed: Feed, item: tuple[int, ...]) -> None:
        self._feed = feed
        self.item = item
        self._iterator: Iterator[Any] | None = None
        self._done = 0
        self._begun: Entry | None = None
        self._back: StreamPosition | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        if self._back is not None:
            self._go_back(self._back)
        empty_rounds = 0
        while True:
            if self._iterator is None:
                self._begun, self._done = Entry.of(self._feed), 0
                self._iterator = iter(self._feed.fresh())
            try:
                item = next(self._iterator)
            except StopIteration:
                self._iterator, self._begun = None, None
                empty_rounds += self._done == 0
                if empty_rounds > 1:
                    raise LoopChangedError(
                        "job.stream over an iterable that has no items"
                    ) from None
                continue
            self._done += 1
            return item

    def position(self) -> StreamPosition:
        """Where the stream is."""
        feed = self._feed
        if self._back is not None:  # no item was taken since; others may have drawn meanwhile
            return replace(self._back, hidden=feed.hidden())
        return StreamPosition(
            self._done, self._begun, feed.position(), feed.hidden(), feed.likeness
        )

    def put_back(self, position: StreamPosition | None) -> None:
        """Go back to a position at the next item; None: start over.

        Its generators are set at once: others may draw from them before the next item is taken.
        """
        self._iterator, self._begun, self._done = None, None, 0
        self._back = position
        if position is not None:
            self._feed.set_hidden(position.hidden)

    def adopt(self, position: StreamPosition | None, restored: dict[int, object]) -> None:
        """Take over the generators of the stream that was here before the interruption."""
        if position is not None:
            self._feed.adopt_hidden(position.hidden, restored)

    def generators(self) -> list[Any]:
        """The random generators that belong to what it iterates over."""
        return self._feed.generators()

    def _go_back(self, position: StreamPosition) -> None:
        """Begin again as it was begun, and drop what was taken; all generators stay as they are."""
        self._back = None
        self._begun = position.begun
        begun = position.begun
        if begun is not None:
            now, hidden = rng.capture_global(), self._feed.hidden()
            begun.apply(self._feed)
            self._iterator = self._feed.resume(
                position.done, _thawed(position.feed), lambda: begun.apply(self._feed)
            )
            self._done = position.done
            rng.restore_global(now)
            self._feed.set_hidden(hidden)


def _lies_in(place: str, loop: str) -> bool:
    """Whether a loader's place, or a stream's key, lies within a loop's items."""
    return place.startswith((f"{loop}.", f"{loop}/"))


def _thawed(frozen: Frozen) -> Any:
    return Saved.of("feed", {"": frozen}).thaw(frozen.tree)


def _moments(finished: dict[int, Moment], writer: Writer) -> dict[str, Json]:
    return {str(ordinal): moment.entry(writer) for ordinal, moment in finished.items()}


def _items(length: int | None) -> str:
    return "an unknown number of items" if length is None else f"{length} items"
