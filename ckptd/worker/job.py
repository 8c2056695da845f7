"""What `ckptd.attach` returns: the user's side of a job.

`Job` is a script that runs without `ckptd launch`: every method does what plain Python would do,
and no more. `LaunchedJob` is the same face with a supervisor behind it.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeVar

import torch

from ckptd import record, wire
from ckptd.errors import (
    CannotCarryError,
    CkptdError,
    DuplicateNameError,
    MismatchError,
    ResumePointMissedError,
    UsageError,
)
from ckptd.host import memory
from ckptd.host.disk import RealDisk
from ckptd.store import fence, store
from ckptd.store import manifest as manifests
from ckptd.worker import callsite, dataloader, environment, orphans, rng, settings, snapshot, tree
from ckptd.worker.arena import Arena, Arenas
from ckptd.worker.ddp import Replicas
from ckptd.worker.link import Link
from ckptd.worker.loops import Loops
from ckptd.worker.moments import Moment, StreamPosition
from ckptd.worker.orphans import Orphans
from ckptd.worker.outputs import Outputs
from ckptd.worker.resting import Resting
from ckptd.worker.snapshot import Layouts, Reader, Writer
from ckptd.worker.state import Carrier, ObjectCarrier, ParameterNames, Parts, Saved, carrier_for
from ckptd.worker.tree import Frozen, Json

T = TypeVar("T")

_EXIT_INTERRUPTED: Final = 75
_EXIT_NOT_DURABLE: Final = 74
#: Of one of several ranks: launchers such as torchrun take anything else for a failure, and say so.
_EXIT_AS_ASKED: Final = 0
_VALUES_EVERY_S: Final = 0.5
_AGREES_POLL_S: Final = 0.0002
_AGREES_WITHIN_S: Final = 10.0  # a supervisor that was stopped must not stop the training
_VARS: Final = "vars"


class Vars:
    """A namespace for loose values: numbers, strings, containers, tensors.

    `job.vars.best = 0.0` sets one; `job.vars(best=0.0, step=0)` gives defaults that never overwrite
    what was restored.
    """

    def __call__(self, **defaults: Any) -> Vars:
        """Set each value that is not there yet."""
        for name, value in defaults.items():
            if name not in self.__dict__:
                setattr(self, name, value)
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"job.vars has no `{name}` yet; give it a first value with job.vars({name}=…)"
        )

    def __repr__(self) -> str:
        return f"job.vars({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"


class _CheckedVars(Vars):
    """Refuses at once what a checkpoint couldn't hold hours later."""

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) not in (int, float, bool, str, type(None)):
            tree.freeze(value, f"job.vars.{name}")
        self.__dict__[name] = value


class Job:
    """A training job, as its script sees it.

    Attributes:
        vars: loose values that are carried; see `Vars`.
        resumed: whether this process continues an earlier one.
    """

    resumed = False

    def __init__(self) -> None:
        self.vars = Vars()

    def track(self, **named: Any) -> None:
        """Carry more objects, as `ckptd.attach` does; saved state is restored at once.

        Raises:
            CannotCarryError: an object, or a value inside it, can't be carried.
            DuplicateNameError: another object has this name.
            MismatchError: the checkpoint holds no object of this name.
        """

    def loop(
        self, iterable: Iterable[T], *, on_resume: Literal["continue", "restart"] = "continue"
    ) -> Iterable[T]:
        """A resumable loop: iterate over what it returns.

        Between two items is a safe point: there the job may be interrupted, and there it continues.
        Loops nest and follow one another; `break` is fine.

        Args:
            iterable: a range, a sequence, a DataLoader, anything with `state_dict` and
                `load_state_dict`, or any other iterable (which is replayed up to its position).
            on_resume: "continue" with the next item, or "restart" at the first one with the state
                that the loop was entered with (an evaluation).

        Raises:
            LoopChangedError: on resume, the iterable is of another kind or length.
            ResumePointMissedError: on resume, the script took another way than the first time.
            MismatchError: at the resume point, a tracked object does not fit the checkpoint.
        """
        _check_on_resume(on_resume)
        return iterable

    def enumerate(self, iterable: Iterable[T], start: int = 0) -> Iterable[tuple[int, T]]:
        """`enumerate(iterable, start)` as a resumable loop: it goes on counting where it was.

        The built-in `enumerate(job.loop(…))` starts at 0 again in a resumed process.
        """
        return builtins.enumerate(iterable, start)

    def stream(self, iterable: Iterable[T]) -> Iterator[T]:
        """An endless iterator, begun anew whenever the iterable ends; its position is carried.

        It is no safe point: take its items within a `job.loop`. In a `zip`, the loop comes first:
        `zip(job.loop(a), job.stream(b))`.
        """
        return _forever(iterable)

    def open(self, path: str | os.PathLike[str], mode: str = "w", **options: Any) -> IO[Any]:
        """Open an output file (metrics, samples) that is rolled back with the checkpoint.

        Args:
            path: the file.
            mode: as for the built-in `open`, for writing.
            **options: as for the built-in `open`.

        Raises:
            UsageError: a mode that does not write.
            MismatchError: on resume, the file is shorter than it was at the checkpoint.
        """
        if "b" not in mode:
            options.setdefault("buffering", 1)
        return builtins.open(path, mode, **options)  # noqa: PTH123  # any kind of path

    def log(self, **values: Any) -> None:
        """What `ckptd status` shows. Numbers, strings, one-element tensors.

        A tensor on another device is only read when that costs no wait.
        """


def _forever(iterable: Iterable[T]) -> Iterator[T]:
    while True:
        yield from iterable


def _check_on_resume(on_resume: str) -> None:
    if on_resume not in ("continue", "restart"):
        raise UsageError(f'on_resume={on_resume!r}: it is "continue" or "restart"')


class LaunchedJob(Job):
    """A job under `ckptd launch`.

    Args:
        address: the supervisor's socket.
        named: what to carry.

    Raises:
        CkptdError: the supervisor is gone or refuses this process.
        CannotCarryError, DuplicateNameError, MismatchError: as for `track`.
    """

    def __init__(self, address: str, named: dict[str, Any]) -> None:
        super().__init__()
        facts = environment.facts()
        self._arenas = Arenas()
        self._layouts = Layouts()
        self._resting = Resting()
        self._rank, self._ranks = _rank(), _world_size()
        hello = wire.Hello(wire.PROTOCOL, os.getpid(), self._rank, self._ranks, facts)
        self._orphans: Orphans | None = None
        self._link = Link(address, hello, self._arenas, self._orphaned)
        welcome = self._link.welcome
        self._run = self._arenas.directory = Path(welcome.run)
        self._arenas.on_spilled = self._spilled
        self.words = self._link.page.words
        self.answered = 0
        self.vars = _CheckedVars()
        self._generation = welcome.generation
        self._kept: _Captured | None = None
        self._carriers: dict[str, Carrier] = {}
        self._unclaimed: dict[str, dict[str, Json]] = {}
        self._outputs = Outputs()
        self._replicas = Replicas() if self._ranks > 1 else None
        self._values: dict[str, Any] = {}
        self._values_due_s = 0.0
        self._reader: Reader | None = None
        self._loops = self.make_loops()
        self._began_s = time.monotonic()
        self._pid = os.getpid()
        self._stood_s = 0.0  # still, until it was agreed where to flush
        self._undecided = 0  # the request for which it was waited in vain
        self._leaving = False
        self._said_once: set[str] = set()
        for text in environment.differences(welcome.environment, facts):
            self.say(text)
        with self._refusals():
            self._look_for_run()
            if self.resumed:
                self._begin_resuming(self._open_checkpoint())
            self.track(**named)
            self._announce_size()
        self._link.forward_signals()
        atexit.register(self._at_exit)

    # -------------------------------------------------------------- the user's calls

    def track(self, **named: Any) -> None:
        with self._refusals():
            for name, target in named.items():
                self._track(name, target)

    def _track(self, name: str, target: Any) -> None:
        known = self._carriers.get(name)
        if known is not None and known.target is not target:
            raise DuplicateNameError(
                f"`{name}` names two objects: a {type(known.target).__qualname__} and another "
                f"{type(target).__qualname__}; give the second one a name of its own"
            )
        if name == _VARS or not name.isidentifier():
            raise CannotCarryError(f"`{name}` can't name a tracked object: choose another word")
        carrier = carrier_for(name, target)
        # What can't be carried is said now and not at the first stop.
        carrier.full(self._carriers_and_names()[1])
        self._carriers[name] = carrier
        if rng.is_generator(target):
            dataloader.tracked[name] = target  # a loader's workers may draw from their copy of it
        if self._reader is None:
            self._claim(carrier)
            return
        saved = self._reader.document["components"]
        if name not in saved:
            raise MismatchError(
                f"`{name}` is tracked, but the checkpoint {self._reader.where} holds no such "
                f"object (it holds {', '.join(sorted(saved))}). Take it out again, or start over "
                "with `ckptd launch --fresh`. Nothing was changed."
            )
        self._restore_early(carrier)

    def loop(
        self, iterable: Iterable[T], *, on_resume: Literal["continue", "restart"] = "continue"
    ) -> Iterable[T]:
        _check_on_resume(on_resume)
        return Loop(self, iterable, restart=on_resume == "restart", numbered=None)

    def enumerate(self, iterable: Iterable[T], start: int = 0) -> Iterable[tuple[int, T]]:
        return Loop(self, iterable, restart=False, numbered=start)

    def stream(self, iterable: Iterable[T]) -> Iterator[T]:
        return self._loops.stream(iterable)

    def open(self, path: str | os.PathLike[str], mode: str = "w", **options: Any) -> IO[Any]:
        with self._refusals():
            return self._outputs.open(path, mode, **options)

    def log(self, **values: Any) -> None:
        self._values.update(values)
        now_s = time.monotonic()
        if now_s >= self._values_due_s:
            self._values_due_s = now_s + _VALUES_EVERY_S
            self._link.page.write_values(_shown(self._values))

    # -------------------------------------------------------------- what the loops call

    def make_loops(self) -> Loops:
        """The job's loops; a drilled job has its own kind."""
        return Loops(self)

    @property
    def resumed(self) -> bool:  # type: ignore[override]
        welcome = self._link.welcome
        return welcome.checkpoint is not None or welcome.memory is not None

    def iterate(
        self, items: Iterable[Any], *, restart: bool, numbered: int | None
    ) -> Iterator[Any]:
        """The items of one loop."""
        with self._refusals():
            yield from self._loops.loop(items, restart=restart, numbered=numbered)

    def moment(self) -> Moment:
        carriers, naming = self._carriers_and_names()
        plain: dict[str, tuple[str, Frozen]] = {}
        for name, carrier in carriers.items():
            frozen = carrier.plain(naming)
            if frozen is not None:
                plain[name] = (carrier.kind, frozen)
        plain[_VARS] = (_VARS, tree.freeze(dict(self.vars.__dict__), "job.vars"))
        return Moment(rng.capture_global(), plain, self._loops.stream_positions())

    def apply(self, moment: Moment) -> None:
        self._restore_vars(moment.plain[_VARS][1])
        moment.apply(*self._carriers_and_names())
        self._loops.restore_streams(moment.streams)

    def targets(self) -> list[object]:
        return [carrier.target for carrier in self._carriers_and_names()[0].values()]

    def say(self, text: str) -> None:
        if not self._link.send(wire.Said(text)):
            print(f"ckptd: {text}", file=sys.stderr)  # nobody else is there to say it

    def say_once(self, text: str) -> None:
        """The same, but never twice."""
        if text not in self._said_once:
            self._said_once.add(text)
            self.say(text)

    def send_snapshot(self, *, keep: bool) -> int:
        began_s = time.monotonic()
        captured = self._capture()
        self._send(captured, began_s, asked=0)
        if keep:
            self._kept = captured
        else:
            self._arenas.let_go(captured.arena)
        return self._generation

    def _spilled(self, refused: OSError | None) -> None:
        """There was no memory for a snapshot beside the training."""
        text = "there is not enough memory for a snapshot beside the training: "
        if refused is None:
            text += f"it goes through a file in {self._run}, which takes longer"
        else:
            text += (
                f"the disk has no room for it either ({refused.strerror}), so it takes what memory "
                "there is; the kernel may kill the job for it, and the last checkpoint stands"
            )
        self.say_once(text)

    def drop_snapshot(self) -> None:
        if self._kept is not None:
            self._arenas.let_go(self._kept.arena)
            self._kept = None

    def answer(self) -> None:
        began_s = time.monotonic()
        if self._ranks > 1:
            due = self._due()
            self._stood_s += time.monotonic() - began_s
            if due is None:
                return
            word = due
        else:
            word = int(self.words[wire.WORD_REQUEST])
        request = wire.request_of(word)
        self.answered = word
        if request is wire.Request.ORPHANED:
            self._save_alone()
        standing = self._loops.standing
        if standing:
            self._link.send(wire.Standing(standing, word))
            generation = standing
        else:
            captured = self._capture()
            self._send(captured, began_s, asked=word)
            self._arenas.let_go(captured.arena)
            generation = self._generation
        if request is wire.Request.LEAVE:
            self._leave(generation)

    def _due(self) -> int | None:
        """Stand still until it is agreed where to flush; the request, if that is here."""
        page = self._link.page
        until_s = time.monotonic() + _AGREES_WITHIN_S
        # It may become another one meanwhile. Who would go on then could pass what that one is
        # agreed upon, where others stand already.
        while (target := page.agreed(word := int(self.words[wire.WORD_REQUEST]))) is None:
            if self._orphans is not None and self._orphans.failed is not None:
                self._give_up(self._orphans.failed)
            if word == self._undecided or time.monotonic() > until_s:
                self._undecided = word  # nobody decides: the next safe point sees
                return None
            time.sleep(_AGREES_POLL_S)
        if not target:
            self.answered = word  # it is asked again, when the ranks are nearer to each other
            return None
        return word if self._loops.position() >= target else None

    def _leave(self, generation: int) -> None:
        """Wait for the receipt and end. The state is in the supervisor's hands already."""
        receipt = self._link.receipt(generation)
        if isinstance(receipt, wire.Apart):
            return
        if receipt is None:
            if self._ranks > 1:
                return  # the others may not be here: on, to where they and this one agree to save
            self._save_alone()
        if not isinstance(receipt, wire.Durable):
            self._exit(_EXIT_NOT_DURABLE)
        self._exit(_EXIT_INTERRUPTED if self._ranks == 1 else _EXIT_AS_ASKED)

    def _exit(self, code: int) -> None:
        self._leaving = True
        raise SystemExit(code)

    # -------------------------------------------------------------- capturing

    def _capture(self) -> _Captured:
        """The whole state in a memfd."""
        # Thousands of small objects are made here, and none of them in a cycle: looking for those
        # again and again would take longer than all the rest.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._capture_now()
        finally:
            if collecting:
                gc.enable()

    def _capture_now(self) -> _Captured:
        writer = Writer(self._resting)
        carriers, naming = self._carriers_and_names()
        components: dict[str, Json] = dict(self._carry_on_unclaimed(writer))
        for name, carrier in carriers.items():
            components[name] = {
                "kind": carrier.kind,
                "parts": _entries(writer, name, carrier.kind, carrier.full(naming)),
            }
        lengths = self._outputs.flush()
        document = {
            "format": snapshot.FORMAT,
            "components": components,
            "replicas": self._record_replicas(carriers, naming),
            "vars": writer.add(_VARS, tree.freeze(dict(self.vars.__dict__), "job.vars")),
            "position": self._loops.record(writer),
            "streams": {
                key: position.entry(writer)
                for key, position in self._loops.stream_positions().items()
            },
            "generators": rng.capture_global(),
            "settings": settings.capture(),
            "outputs": lengths,
            "values": _shown(self._values),
        }
        self._outputs.durable(self._link.durable)
        outputs = self._outputs.unsynced()
        arena, table, listed = writer.write(document, outputs, self._arenas, self._layouts)
        where = self._loops.described() if self._ranks > 1 else ""
        return _Captured(arena, self._loops.step, table, listed, where)

    def _record_replicas(
        self, carriers: dict[str, Carrier], naming: ParameterNames
    ) -> dict[str, Json]:
        if self._replicas is None:
            return {}
        tracked = {id(carrier.target) for carrier in carriers.values()}
        return self._replicas.record(naming, tracked, self.say_once)

    def _announce_size(self) -> None:
        """Before the first step: about how much a snapshot will need.

        Raises:
            UsageError: this process may not have a file, or a memory, of that size.
        """
        carriers, naming = self._carriers_and_names()
        where = "the script" if self._reader is None else self._reader.where
        with _reading("what was tracked", where):
            now = sum(
                tensor.nbytes
                for carrier in carriers.values()
                for frozen in carrier.full(naming).values()
                for _, tensor in frozen.tensors
            )
        limit = memory.limit()
        if limit is not None and limit < now:
            raise UsageError(
                f"`ulimit -f` allows files of {limit >> 10} KiB, and a checkpoint of this job has "
                f"at least {now >> 10} KiB: raise it (ulimit -f unlimited) and start the job again"
            )
        later = sum(carrier.later() for carrier in carriers.values())
        self._link.send(wire.Sized(now + later))

    def _carry_on_unclaimed(self, writer: Writer) -> Iterator[tuple[str, Json]]:
        """Objects of the checkpoint that the script has not tracked again yet."""
        for name, component in self._unclaimed.items():
            if name not in self._carriers:
                kind, parts = component["kind"], component["frozen"]
                yield name, {"kind": kind, "parts": _entries(writer, name, kind, parts)}

    def _send(self, captured: _Captured, began_s: float, *, asked: int) -> None:
        self._generation += 1
        message = wire.Snapshot(
            self._generation,
            captured.step,
            captured.listed,
            asked,
            time.monotonic() - began_s + self._stood_s,
            captured.where,
        )
        self._stood_s = 0.0
        if asked:
            self._outputs.sent(self._generation)
        # Before it is sent: it may be let go of before `send` returns.
        self._arenas.sent(self._generation, captured.arena)
        self._link.send(message, [captured.arena.descriptor])

    def _orphaned(self, link: Link) -> None:
        """The supervisor is gone; called from the link's thread."""
        if self._ranks > 1:
            run, attempt = Path(link.welcome.run), link.welcome.attempt
            self._orphans = Orphans(RealDisk(), run, attempt, self._rank, self._ranks)
            self._orphans.agree(link.page)
        else:
            link.page.words[wire.WORD_REQUEST] = orphans.word_of(0)

    def _save_alone(self) -> None:
        """The supervisor is gone: publish the state from here, and leave."""
        captured = self._kept or self._capture()
        try:
            if self._orphans is None:
                _publish_alone(self._run, self._link.welcome, {0: captured.part()}, captured.step)
            else:
                self._save_together(captured, self._orphans)
        except (CkptdError, OSError) as error:
            self._give_up(str(error), getattr(error, "exit_code", _EXIT_NOT_DURABLE))
        self._exit(_EXIT_INTERRUPTED)

    def _save_together(self, captured: _Captured, others: Orphans) -> None:
        """What one of several ranks does then.

        Raises:
            CkptdError, OSError: this state is not durable.
        """
        told = orphans.Told(captured.step, captured.where, captured.listed)
        if self._rank:
            others.leave_snapshot(told, memory.readable(captured.arena.descriptor))
            others.check_outcome()
            return
        why = ""
        try:
            self._publish_all(captured, others.snapshots(told))
        except (CkptdError, OSError) as error:
            why = str(error)
            raise
        finally:
            others.tell_outcome(why)

    def _publish_all(self, own: _Captured, others: dict[int, tuple[orphans.Told, Path]]) -> None:
        parts = {0: own.part()}
        with ExitStack() as stack:
            for rank, (told, path) in others.items():
                file = stack.enter_context(path.open("rb"))
                table = wire.table_in(memory.readable(file.fileno()), told.table)
                parts[rank] = file.fileno(), table
            _publish_alone(self._run, self._link.welcome, parts, own.step)

    def _give_up(self, why: str, code: int = _EXIT_NOT_DURABLE) -> None:
        print(f"ckptd: {why}", file=sys.stderr, flush=True)  # nobody else can
        self._exit(code)

    # -------------------------------------------------------------- restoring

    def _look_for_run(self) -> None:
        """Before the first step: a node that sees no checkpoint would take all for damaged.

        Raises:
            UsageError: this machine has another directory there, or none.
        """
        if self._ranks > 1 and not fence.is_there(
            RealDisk(), self._run, self._link.welcome.attempt
        ):
            raise UsageError(
                f"{os.uname().nodename}, where rank {self._rank} runs, does not see the run's "
                f"directory {self._run}: all nodes of a job have to. Choose one on a file system "
                "that they share: ckptd launch --dir DIRECTORY"
            )

    def _open_checkpoint(self) -> Reader:
        """What to resume from: a snapshot of the attempt before in memory, or a checkpoint."""
        welcome = self._link.welcome
        if welcome.memory is not None:
            return Reader.of_memory(self._link.snapshot[0], welcome.memory)
        assert welcome.checkpoint is not None, "one of the two"
        path = Path(welcome.checkpoint)
        # The supervisor has read all of it; what belongs to the other ranks is theirs to read.
        manifest = store.verify(RealDisk(), path, rank=self._rank)
        return Reader.of_directory(path, manifests.files_of(self._rank, manifest.files))

    def _begin_resuming(self, reader: Reader) -> None:
        self._reader = reader
        document = reader.document
        with _reading("it", reader.where):
            rng.check_global(document["generators"])
            self._outputs.expect(document["outputs"])
            self._restore_vars(reader.frozen(document["vars"]))
            self._values = dict(document["values"])
            self._loops.begin_resuming(reader, document["position"], document["streams"])
            if not isinstance(document["components"], dict):
                raise TypeError("its components are no object")
            for name, component in document["components"].items():
                if component["kind"] == "module":
                    self._expect_resting(snapshot.file_name(name), component["parts"][""])

    def _expect_resting(self, file: str, entry: dict[str, Json]) -> None:
        """Where a module's parameters lie: the next checkpoint keeps to it."""
        apart = snapshot.resting_file(file)
        resting = {ref[1] for ref in entry["tensors"] if ref[0] == apart}
        if resting:
            others = {ref[1] for ref in entry["tensors"]} - resting
            self._resting.expect(file, resting, others)

    def _restore_early(self, carrier: Carrier) -> None:
        """At `track`: what fits is restored; what the script still has to rebuild waits."""
        assert self._reader is not None, "called while resuming"
        _, naming = self._carriers_and_names()
        for name, one in _with_parts(carrier).items():
            component = self._reader.document["components"].get(name)
            if component is None:
                continue
            with _reading(f"`{name}`", self._reader.where):
                saved = self._reader.saved(component)
                try:
                    one.check(saved, naming)
                except MismatchError:
                    continue  # checked again, and then an error, at the resume point
                one.restore(saved, naming)

    @torch.inference_mode(mode=False)  # an evaluation may be, and what is made in it stays so
    def restore_everything(self) -> None:
        """At the resume point: check all that is tracked, then restore it, then the generators."""
        assert self._reader is not None, "called while resuming"
        document, components = self._reader.document, self._reader.document["components"]
        where = self._reader.where
        carriers, naming = self._carriers_and_names()
        pairs = []
        for name, one in _ordered(carriers):
            if name in components:
                with _reading(f"`{name}`", where):
                    pairs.append((one, self._reader.saved(components[name])))
                    one.check(pairs[-1][1], naming)
        self._outputs.check()
        rng.check_global(document["generators"])
        if self._replicas is not None:
            # What another rank's death does to a collective is raised as it comes: it is not the
            # checkpoint's fault, and starting again helps.
            self._replicas.restore(document["replicas"], naming, self.say_once)
        for one, saved in pairs:
            with _reading(f"`{one.name}`", where):
                one.restore(saved, naming)
        with _reading("it", where):
            self._restore_vars(self._reader.frozen(document["vars"]))
            self._outputs.roll_back()
            self._loops.restore_streams(
                {
                    key: StreamPosition.read(self._reader, entry)
                    for key, entry in document["streams"].items()
                }
            )
            self._keep_unclaimed(carriers)
            settings.restore(document["settings"])
            rng.restore_global(document["generators"])
        self._reader.close()
        self._reader = None
        self._link.send(wire.Restored(self._loops.step, time.monotonic() - self._began_s))

    def _claim(self, carrier: Carrier) -> None:
        """After the resume point: what the checkpoint kept for an object that is tracked late."""
        _, naming = self._carriers_and_names()
        for name, one in _with_parts(carrier).items():
            kept = self._unclaimed.get(name)
            if kept is not None:
                saved = Saved.of(kept["kind"], kept["frozen"])
                one.check(saved, naming)
                one.restore(saved, naming)
                del self._unclaimed[name]

    def _keep_unclaimed(self, carriers: dict[str, Carrier]) -> None:
        """Objects that the script will track later than here: kept, and carried on."""
        assert self._reader is not None, "called while resuming"
        for name, component in self._reader.document["components"].items():
            if name not in carriers:
                parts = {p: self._reader.frozen(e) for p, e in component["parts"].items()}
                self._unclaimed[name] = {"kind": component["kind"], "frozen": parts}

    def _restore_vars(self, frozen: Frozen) -> None:
        own = self.vars.__dict__
        restored = Saved.of(_VARS, {"": frozen}).thaw(frozen.tree, dict(own), name="job.vars")
        own.clear()
        own.update(restored)

    # -------------------------------------------------------------- the small things

    def _carriers_and_names(self) -> tuple[dict[str, Carrier], ParameterNames]:
        """All carriers, those inside plain objects too, and the names of all parameters in them."""
        found: dict[str, Carrier] = {}
        for carrier in self._carriers.values():
            found.update(_with_parts(carrier))
        return found, ParameterNames(found.values())

    def _refusals(self) -> _Refusals:
        return _Refusals(self._link)

    def _at_exit(self) -> None:
        """The interpreter ends: say whether in good order."""
        if os.getpid() != self._pid:
            return
        missed = self._reader is not None
        if missed and not self._leaving:
            where = self._loops.plan[0].where if self._loops.plan else "?"
            error = ResumePointMissedError(
                f"the script ended without coming back to the loop at {where}, in which it was "
                "interrupted: a branch was not taken that was taken the first time"
            )
            print(f"ckptd: {error}", file=sys.stderr, flush=True)  # past any handler
        # Set by the interpreter when an exception ended the script; a shell may hide its status.
        failed = getattr(sys, "last_value", None) is not None
        self._link.send(wire.Bye(finished=not (missed or failed or self._leaving)))
        if self._link.orphaned:
            sys.stdout.flush()
            sys.stderr.flush()
            self._link.drain_output()
        self._link.finish()


class Loop(Iterable[Any]):
    """What `LaunchedJob.loop` returns: iterable once or more, with a length where there is one."""

    def __init__(
        self, job: LaunchedJob, items: Iterable[Any], *, restart: bool, numbered: int | None
    ) -> None:
        self._job = job
        self._items = items
        self._restart = restart
        self._numbered = numbered

    def __iter__(self) -> Iterator[Any]:
        if self._numbered is None and callsite.is_call_of("enumerate"):
            self._job.say_once(
                f"enumerate(job.loop(…)) at {callsite.where()} counts from 0 again when the job is "
                "resumed there: use job.enumerate(…)"
            )
        return self._job.iterate(self._items, restart=self._restart, numbered=self._numbered)

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # a TypeError, as without ckptd


@contextmanager
def _reading(what: str, where: str) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read back is said with its place in it."""
    try:
        yield
    except (CkptdError, OSError):
        raise
    except Exception as error:
        raise MismatchError(
            f"{what} could not be restored from {where}: {type(error).__name__}: {error}"
        ) from error


class _Refusals:
    """Tells the supervisor of errors that starting again would not mend."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CkptdError) and not getattr(error, "_ckptd_told", False):
            error._ckptd_told = True  # type: ignore[attr-defined]  # noqa: SLF001  # nested calls
            self._link.send(wire.Refused(type(error).__name__, str(error)))


@dataclass(frozen=True, slots=True)
class _Captured:
    """A whole state in memory.

    Attributes:
        listed: where in the memory its table is written down.
        where: in the script it was taken; see `wire.Snapshot.place`.
    """

    arena: Arena
    step: int
    table: wire.Table
    listed: wire.Place
    where: str

    def part(self) -> tuple[int, wire.Table]:
        """The descriptor of the memory, and what is where in it."""
        return self.arena.descriptor, self.table


def _publish_alone(
    run: Path, welcome: wire.Welcome, parts: dict[int, tuple[int, wire.Table]], step: int
) -> None:
    """Publish snapshots, by rank, from the worker, with the supervisor's own function.

    Raises:
        NotDurableError: the disk refused.
        FencedError: a newer attempt of the job runs somewhere.
    """
    disk = RealDisk()
    memories = [
        (descriptor, manifests.in_checkpoint(rank, wire.places(table.files)))
        for rank, (descriptor, table) in parts.items()
    ]
    with memory.pieces(memories) as files:
        store.publish_attempt(
            disk,
            run,
            step=step,
            attempt=welcome.attempt,
            files=files,
            outputs=[Path(output) for _, table in parts.values() for output in table.outputs],
            created=time.time(),
        )
    try:
        store.prune(disk, run / "checkpoints", welcome.keep)
    except OSError as error:  # it is durable: what is old can go another time
        print(f"ckptd: old checkpoints could not be removed: {error}", file=sys.stderr, flush=True)


def _entries(writer: Writer, name: str, kind: str, parts: Parts) -> dict[str, Json]:
    stem = snapshot.file_name(name)
    return {
        part: writer.add(
            f"{stem}.{part}" if part else stem, frozen, own=kind == "module" and not part
        )
        for part, frozen in parts.items()
    }


def _with_parts(carrier: Carrier) -> dict[str, Carrier]:
    """A carrier and, for a plain object, those of the modules and the like inside it."""
    found: dict[str, Carrier] = {}
    todo = [carrier]
    while todo:
        one = todo.pop()
        if one.name in found or any(one.target is other.target for other in found.values()):
            continue
        found[one.name] = one
        if isinstance(one, ObjectCarrier):
            todo += one.parts().values()
    return found


def _ordered(carriers: dict[str, Carrier]) -> list[tuple[str, Carrier]]:
    """Modules first (optimizers know parameters through them), then optimizers, then the rest."""
    rank = {"module": 0, "optimizer": 1}
    return sorted(carriers.items(), key=lambda item: rank.get(item[1].kind, 2))


def _shown(values: dict[str, Any]) -> dict[str, float | int | str]:
    """Values as `ckptd status` shows them; a tensor on another device is left out."""
    shown: dict[str, float | int | str] = {}
    for name, value in values.items():
        if isinstance(value, bool | int | float | str):
            shown[name] = value
        elif hasattr(value, "item") and getattr(value, "device", None) is None:
            shown[name] = value.item()  # a numpy scalar
        elif hasattr(value, "item") and value.device.type == "cpu" and value.numel() == 1:
            shown[name] = value.item()
    return {k: v if not isinstance(v, float) or v - v == 0 else repr(v) for k, v in shown.items()}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


_attached: LaunchedJob | None = None


def track_generators(named: dict[str, Any]) -> None:
    """See `ckptd.track`."""
    for name, target in named.items():
        if not rng.is_generator(target):
            raise CannotCarryError(
                f"`{name}` is a {type(target).__qualname__}; ckptd.track is for random generators. "
                f"Give it to ckptd.attach({name}=…), or to job.track({name}=…)"
            )
    dataloader.tracked.update(named)
    if _attached is not None and multiprocessing.parent_process() is None:
        _attached.track(**named)


def attach(named: dict[str, Any]) -> Job:
    """The job of this process; see `ckptd.attach`."""
    global _attached  # noqa: PLW0603  # one process has one job
    address = os.environ.get(wire.ENV_SOCKET)
    if address is None or multiprocessing.parent_process() is not None:
        job = Job()
        for name, target in named.items():
            carrier_for(name, target)  # the same error with and without a supervisor
        return job
    named = {**dataloader.tracked, **named}
    drill = os.environ.get(record.ENV_DRILL)
    if drill is None:
        _attached = LaunchedJob(address, named)
    else:
        if _world_size() > 1:
            raise UsageError(
                f"this is rank {_rank()} of {_world_size()}: `ckptd drill` tries jobs of one "
                "process; start it with one"
            )
        from ckptd.worker.drilled import DrilledJob  # only a drill pays for it

        _attached = DrilledJob(address, named, Path(drill))
    return _attached
