"""The job of a drilled run: the same job, which also writes down what it came by.

At every safe point a `record.Mark` goes to the drill's file: digests of everything that is tracked,
of every random stream, of the items handed out and the values logged, and of the script's own
variables that it may still read. At the safe points that the drill's plan names, the job is
interrupted, from here, so that the moment is exact.

Rules:

1. What is recorded changes nothing: no draw, no write to anything that is the script's.
2. A job that is not drilled does not import this file.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import DataLoader

from ckptd import record, wire
from ckptd.errors import CkptdError
from ckptd.worker import callsite, dataloader, rng, settings, variables
from ckptd.worker.digests import digest, digest_parts
from ckptd.worker.job import Job, LaunchedJob, Loop, Vars
from ckptd.worker.loops import Frame, Loops
from ckptd.worker.state import Carrier, Naming, carrier_for

_ARRIVES_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.001
_ATTRIBUTES_DEPTH: Final = 3
_ATTRIBUTES_MAX: Final = 200
_PLAIN: Final = (
    *(bool, int, float, complex, str, bytes, bytearray, type(None)),
    *(list, tuple, dict, set, frozenset, deque),
)
#: What has no state that a run's result could depend on, or state of its own that loops carry.
_PASSED_OVER: Final = (
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type),
    *(io.IOBase, Iterator, Job, Vars, Loop),
)


class RecordedLoops(Loops):
    """Loops that tell of each safe point, also of those at which a request has to wait."""

    def __init__(self, host: DrilledJob) -> None:
        super().__init__(host)
        self._drilled = host

    def _answer(self) -> None:
        if not self.plan:
            self._drilled.at_safe_point(self.open_frames(), strikable=not self._blind())
        super()._answer()


class DrilledJob(LaunchedJob):
    """See the module.

    Args:
        address: the supervisor's socket.
        named: what to carry.
        drill: the drilled run's directory.
    """

    def __init__(self, address: str, named: dict[str, Any], drill: Path) -> None:
        self._drill = drill
        self._strikes = list(enumerate(record.decode_plan((drill / record.PLAN).read_bytes())))
        self._marks = os.open(drill / record.MARKS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._components: dict[str, str] = {}
        self._variables: dict[str, str] = {}
        self._items: dict[str, str] = {}
        self._logged: dict[str, list[Any]] = {}
        self._first = True
        self._said: list[str] = []
        super().__init__(address, named)
        atexit.register(self._at_end)

    # -------------------------------------------------------------- in the loops' way

    def make_loops(self) -> Loops:
        return RecordedLoops(self)

    @property
    def answered(self) -> int:
        """Never what is asked, so that the loops come by here at each safe point."""
        return -1

    @answered.setter
    def answered(self, word: int) -> None:
        self._answered = word

    def answer(self) -> None:
        if self.words[wire.WORD_REQUEST] != self._answered:
            super().answer()

    def iterate(
        self, items: Iterable[Any], *, restart: bool, numbered: int | None
    ) -> Iterator[Any]:
        for item in super().iterate(items, restart=restart, numbered=numbered):
            where = self._loops.open_frames()[-1].where
            self._items[where] = digest(item if numbered is None else item[1])
            yield item

    def log(self, **values: Any) -> None:
        super().log(**values)
        for name, value in values.items():
            self._logged.setdefault(name, []).append(value)

    def say(self, text: str) -> None:
        self._said.append(text)
        super().say(text)

    # -------------------------------------------------------------- marks

    def at_safe_point(self, frames: list[Frame], *, strikable: bool) -> None:
        """Write down what holds here; interrupt the job if the plan says so."""
        key = "/".join(f"{frame.ordinal}:{frame.done}" for frame in frames)
        key = f"{key} {frames[-1].phase}"
        self._write_mark(key, _place(frames), strikable=strikable)
        if not strikable:
            return
        for number, strike in self._strikes:
            if strike.key == key and self._claim_strike(number):
                self._strike(strike)

    def _at_end(self) -> None:
        failed = getattr(sys, "last_value", None) is not None
        if not (self._leaving or failed or self._reader) and os.getpid() == self._pid:
            self._write_mark(record.END, record.END, strikable=False)

    def _write_mark(self, key: str, place: str, *, strikable: bool) -> None:
        components = self._digest_components()
        found = {} if key == record.END else self._digest_variables()
        values = {name: one[0] for name, one in found.items()}
        changed = _changed(self._variables, values)
        mark = record.Mark(
            key=key,
            step=self._loops.step,
            place=place,
            first=self._first,
            strikable=strikable,
            changed=_changed(self._components, components),
            items=self._items,
            logged={name: digest([_number(v) for v in vs]) for name, vs in self._logged.items()},
            variables=changed,
            gone=[name for name in self._variables if name not in values],
            kinds={name: found[name][1] for name in changed if found[name][1]},
            said=self._said,
            outputs=self._outputs.names() if key == record.END else [],
        )
        os.write(self._marks, record.encode(mark))
        self._components, self._variables = components, values
        self._items, self._logged, self._said, self._first = {}, {}, [], False

    def _digest_components(self) -> dict[str, str]:
        """Everything that ckptd carries, by "kind:a name for people"."""
        found: dict[str, str] = {}
        carriers, naming = self._carriers_and_names()
        for name, carrier in carriers.items():
            for part, text in digest_parts(carrier.full(naming)).items():
                beside = f" ({_PART_NAMES.get(part, part)})" if part else ""
                found[f"object:`{name}`{beside}"] = text
        for name, value in self.vars.__dict__.items():
            found[f"vars:`job.vars.{name}`"] = digest(value)
        for name, value in settings.capture().items():
            found[f"settings:torch's {name}"] = digest(value)
        for name, state in rng.capture_global().items():
            found[f"stream:{_STREAM_NAMES.get(name, name)} stream"] = digest(state)
        for frame in self._loops.open_frames():
            for name, state in _loader_streams(frame).items():
                found[f"loader:{name} (loop at {frame.where})"] = digest(state)
        return found

    # -------------------------------------------------------------- the script's own variables

    def _digest_variables(self) -> dict[str, tuple[str, str]]:
        """Variable -> (digest, what it is), of those that are not carried and may be read yet."""
        carriers, naming = self._carriers_and_names()
        walk = _Walk(carriers, naming)
        for frame in callsite.frames():
            if frame.f_code.co_name == "<module>":
                continue  # its variables are the module's, below
            where = f" in {frame.f_code.co_name}()"
            for name in sorted(variables.live(frame) & frame.f_locals.keys()):
                walk.take(name, where, frame.f_locals[name])
        script = next((f for f in callsite.frames() if f.f_code.co_name == "<module>"), None)
        for module in variables.user_modules():
            if script is not None and script.f_globals is vars(module):
                for name in sorted(variables.live(script) & vars(module).keys()):
                    walk.take(name, "", vars(module)[name])
            where = " (global)" if module.__name__ == "__main__" else f" in {module.__name__}"
            for name, value in sorted(variables.global_variables(module).items()):
                walk.take(name, where, value)
        return walk.found

    # -------------------------------------------------------------- strikes

    def _claim_strike(self, number: int) -> bool:
        try:
            os.close(os.open(self._drill / f"done-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _strike(self, strike: record.Strike) -> None:
        if strike.how == record.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        name = {record.CHECKPOINT: "USR2", record.ORPHAN: "KILL"}.get(strike.how, strike.how)
        before = self.words[wire.WORD_REQUEST]
        os.kill(self._link.supervisor_pid(), signal.Signals[f"SIG{name}"])
        bound_s = time.monotonic() + _ARRIVES_WITHIN_S
        while self.words[wire.WORD_REQUEST] == before:
            if time.monotonic() > bound_s:
                raise CkptdError(f"the drill sent SIG{name}, and no request came of it")
            time.sleep(_POLL_S)


_PART_NAMES: Final = {"beside": "gradients, flags, hidden buffers"}
_STREAM_NAMES: Final = {"random": "Python `random`", "numpy": "`numpy.random`", "torch": "torch"}


class _Walk:
    """Goes over variables, and the attributes of plain objects, and leaves out what is carried."""

    def __init__(self, carriers: dict[str, Carrier], naming: Naming) -> None:
        self.found: dict[str, tuple[str, str]] = {}
        self._naming = naming
        self._tracked = {name: carrier.target for name, carrier in carriers.items()}
        self._passed = {id(target) for target in self._tracked.values()}
        for target in self._tracked.values():
            if isinstance(target, torch.nn.Module):
                self._passed.update(map(id, target.modules()))
                self._passed.update(map(id, target.parameters()))
                self._passed.update(map(id, target.buffers()))

    def take(self, name: str, where: str, value: Any, depth: int = 0) -> None:
        """Digest one variable."""
        if isinstance(value, type) and callsite.is_users_module(value.__module__):
            for key, attribute in vars(value).items():  # what all objects of the class share
                self.take(f"{name}.{key}", where, attribute, depth + 1)
        if id(value) in self._passed or isinstance(value, _PASSED_OVER) or name.startswith("__"):
            return
        shown = f"`{name}`{where}"
        if f"`{name}`" in self.found:
            return  # a global that is live in the script itself
        if isinstance(value, DataLoader):
            self.take(f"{name}.dataset", where, value.dataset, depth + 1)
            return
        rebound = name in self._tracked and type(value) is type(self._tracked[name])
        carried = None if _is_plain(value) else self._carrier(name, value)
        if carried is not None:
            self._passed.add(id(value))
            self.found[shown] = carried, type(value).__qualname__
        elif _is_plain(value) or depth >= _ATTRIBUTES_DEPTH or not hasattr(value, "__dict__"):
            self.found[shown] = digest(value), "" if _is_plain(value) else type(value).__qualname__
        else:
            self._passed.add(id(value))
            for key, attribute in list(vars(value).items())[:_ATTRIBUTES_MAX]:
                self.take(f"{name}.{key}", where, attribute, depth + 1)
        if rebound and shown in self.found:
            self.found[shown] = self.found[shown][0], record.REBOUND

    def _carrier(self, name: str, value: Any) -> str | None:
        """The digest of an object that could be tracked as a whole; None: it is a plain object."""
        is_whole = isinstance(value, torch.nn.Module | torch.optim.Optimizer) or all(
            callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")
        )
        if not is_whole and not rng.is_generator(value):
            return None
        try:
            parts = carrier_for(name, value).full(self._naming)
        except (CkptdError, RuntimeError, TypeError, AttributeError):
            return digest(value)  # what can't be carried is still compared
        return digest(sorted(digest_parts(parts).items()))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or hasattr(value, "__array__")


def _changed(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in now.items() if before.get(name) != text}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _place(frames: list[Frame]) -> str:
    """For people: "train.py:31, item 12 of 100"."""
    frame = frames[-1]
    if frame.phase == "entry":
        return f"{frame.where}, before the first item"
    if frame.phase == "end":
        return f"{frame.where}, after the last item"
    of = "" if frame.feed.length is None else f" of {frame.feed.length}"
    return f"{frame.where}, {frame.done} items{of} done"


def _loader_streams(frame: Frame) -> dict[str, Any]:
    """The random states behind one loop's items, by a name for people."""
    feed = frame.feed
    found: dict[str, Any] = {f"`{path}`": state for path, state in feed.states().items()}
    if isinstance(feed, dataloader.LoaderFeed):
        found |= feed.worker_streams()
    return found
