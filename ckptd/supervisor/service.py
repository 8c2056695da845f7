"""Several jobs of one user, each under a supervisor of its own: what `ckptd resume --all` runs.

Rules:

1. A supervisor is a process of its own. One that is killed takes no other with it, and is started
   again.
2. A stop is passed on to every supervisor, and all of them are waited for: each has a deadline of
   its own, and the host is asked for more time meanwhile.
3. What a supervisor ended with is its job's end: nothing is started again here that it did not want
   to have started again. One that was killed, or failed itself, decided nothing: it is started
   again after a pause that grows, so many times in a row.
4. One job's damage is its own: it is said, and the others go on.
5. Nothing is read from a run's directory in the main thread, which the host expects to hear from: a
   disk may answer late, or never. One that is not there yet is looked for again.
6. What its owner stopped is not started again, whenever that happened (`registry`).
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptd.errors import CkptdError
from ckptd.host.host import Host
from ckptd.host.signals import Signals
from ckptd.supervisor import registry, server
from ckptd.supervisor.errands import Errands
from ckptd.supervisor.policy import Exit, described
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.run import Run

_TURN_S: Final = 1.0
_STATUS_S: Final = 5.0
_MORE_TIME_S: Final = 30.0
_ANSWER_BOUND_S: Final = 2.0
_PAUSE_S_MAX: Final = 600.0
_DEATHS_MAX: Final = 12
#: A supervisor that ran for so long had no trouble to start.
_WELL_S: Final = 600.0
_LOOK_AGAIN_S: Final = 60.0
#: After so long without an answer a directory is said to hang, and no longer waited for.
_LOOK_BOUND_S: Final = 30.0
_JUST_NOW_S: Final = 5.0
#: Saving may take long, but not for ever: after this the host's own limit holds.
_STOP_S_MAX: Final = 3600.0


@dataclass
class _Kept:
    """One job: its supervisor, and how often in a row that ended without having decided to.

    Attributes:
        process: None: it is being started, or will be.
        asked_s: when somebody went to start it; None: nobody is on the way.
        said: that its directory does not answer.
    """

    run: Run
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started_s: float = 0.0
    deaths: int = 0
    again_s: float = 0.0
    asked_s: float | None = None
    said: bool = False


@dataclass(frozen=True)
class _NotStarted:
    """Why a job was not started.

    Attributes:
        text: the reason.
        code: the exit code that this is worth.
        later: whether it is worth looking again.
    """

    text: str
    code: int = Exit.FINISHED
    later: bool = False


class Service:
    """Keeps jobs.

    Args:
        jobs: this user's.
        host: what started us.
        say: tells the user.
        stay: whether to wait for more jobs when none is left.
    """

    def __init__(
        self, jobs: Registry, host: Host, say: Callable[[str], None], *, stay: bool
    ) -> None:
        self._registry, self._host, self._say, self._stay = jobs, host, say, stay
        self._kept: dict[Path, _Kept] = {}
        #: Of runs that could not be seen: when to look again.
        self._missing: dict[Path, float] = {}
        self._looks, self._look_again = False, False
        self._look_again_s = math.inf
        self._asked_s = -math.inf  # when somebody last had us look
        self._codes: list[int] = []
        self._stop_began_s: float | None = None
        self._selector = selectors.DefaultSelector()
        self._signals, self._errands = Signals(), Errands(say)
        self._status_s = 0.0
        self._summary = ""

    def run(self) -> int:
        """Keep the jobs until they have ended or a signal comes; the exit code."""
        self._selector.register(self._signals, selectors.EVENT_READ, self._signals_came)
        self._selector.register(self._errands, selectors.EVENT_READ, self._errands.deliver)
        try:
            self._look()
            self._host.ready()
            while self._kept or ((self._stay or self._looks) and not self._stopping):
                for key, _ in self._selector.select(_TURN_S):
                    key.data()
                self._start_again()
                self._tell_host()
        finally:
            self._signals.close()
            self._selector.close()
        return next((code for code in self._codes if code != Exit.FINISHED), Exit.FINISHED)

    @property
    def _stopping(self) -> bool:
        return self._stop_began_s is not None

    # -------------------------------------------------------------- starting

    def _look(self) -> None:
        """Start what is registered and not kept yet."""

        def registered() -> list[Run] | OSError:
            try:
                return self._registry.runs()
            except OSError as error:
                return error

        # What is under way may have passed by what is asked for now.
        self._looks, self._look_again = True, self._looks
        self._errands.ask("registry", registered, self._found)

    def _found(self, runs: list[Run] | OSError) -> None:
        self._looks = False
        if self._look_again:
            self._look()
        if isinstance(runs, OSError):
            self._say(f"{self._registry.path} can't be read: {runs.strerror}")
            self._codes.append(Exit.NOT_DURABLE)
            self._look_again_s = time.monotonic() + _LOOK_AGAIN_S
            return
        self._look_again_s = math.inf
        for run in runs:
            if run.path not in self._kept and not self._stopping:
                self._kept[run.path] = kept = _Kept(run)
                self._start(kept)

    def _start(self, kept: _Kept) -> None:
        """In a thread: all of it reads the run's directory, or starts a process in it."""
        kept.asked_s = time.monotonic()

        def tried() -> subprocess.Popen[bytes] | _NotStarted:
            try:
                why = self._why_not(kept.run)
                return why or registry.start(kept.run, if_wanted=True)
            except OSError as error:
                return _NotStarted(f"can't be started: {error}", Exit.NOT_DURABLE, later=True)
            except CkptdError as error:
                return _NotStarted(f"can't be started: {error}", Exit.USAGE)

        self._errands.ask(f"start {kept.run.path}", tried, lambda found: self._tried(kept, found))

    def _why_not(self, run: Run) -> _NotStarted | None:
        if self._stopping:
            return _NotStarted("is not started any more: stopping")
        if not self._registry.has(run):
            return _NotStarted("was stopped by its owner")
        if run.job() is None:
            text = f"is not there, in {run.path.parent} (a disk that is not mounted?): left out"
            return _NotStarted(text, later=True)
        holder = run.supervisor()
        if holder is None or holder.alive() is False:
            return None
        if holder.alive() is None:
            return _NotStarted(f"runs elsewhere, on {holder.node or holder.host}")
        return _NotStarted(f"runs already (process {holder.pid})")

    def _tried(self, kept: _Kept, found: subprocess.Popen[bytes] | _NotStarted) -> None:
        kept.asked_s, path = None, kept.run.path
        if isinstance(found, _NotStarted):
            self._kept.pop(path, None)
            if found.text and not (found.later and path in self._missing):
                self._say(f"{path.name} {found.text}")
                self._codes.append(found.code)
            self._missing.pop(path, None)
            if found.later:
                self._missing[path] = time.monotonic() + _LOOK_AGAIN_S
            return
        self._missing.pop(path, None)
        self._kept[path] = kept  # it may have been given up on while its disk did not answer
        kept.process, kept.started_s, kept.said = found, time.monotonic(), False
        kept.pidfd = os.pidfd_open(found.pid)
        self._selector.register(kept.pidfd, selectors.EVENT_READ, lambda: self._ended(kept))
        self._say(f"{path.name} goes on, under process {found.pid}")
        if self._stopping:
            found.send_signal(signal.SIGTERM)

    def _start_again(self) -> None:
        now_s = time.monotonic()
        for path, kept in [*self._kept.items()]:
            if kept.process is not None:
                continue
            if kept.asked_s is not None:
                if now_s - kept.asked_s >= _LOOK_BOUND_S:
                    self._does_not_answer(kept)
            elif self._stopping:
                self._kept.pop(path)
            elif now_s >= kept.again_s:
                self._start(kept)
        if now_s >= self._look_again_s:
            self._look_again_s = math.inf
            self._look()
        for path, again_s in [*self._missing.items()]:
            if now_s >= again_s and path not in self._kept and not self._stopping:
                self._kept[path] = kept = _Kept(Run(path))
                self._start(kept)

    def _does_not_answer(self, kept: _Kept) -> None:
        """It is started as soon as its disk answers; whoever waits for the last job does not."""
        if not kept.said:
            kept.said = True
            self._say(f"{kept.run.path} does not answer (a network disk?): not waited for")
        if self._stopping or not self._stay:
            self._kept.pop(kept.run.path)

    # -------------------------------------------------------------- ending

    def _ended(self, kept: _Kept) -> None:
        assert kept.process is not None, "only then is it watched"
        code = kept.process.wait()
        self._selector.unregister(kept.pidfd)
        os.close(kept.pidfd)
        kept.process = None
        name, now_s = kept.run.path.name, time.monotonic()
        # A supervisor that was killed, or failed itself, decided nothing.
        undecided = code not in _DECIDED
        if undecided and not self._stopping:
            kept.deaths = 1 if now_s - kept.started_s >= _WELL_S else kept.deaths + 1
            said = f"the supervisor of {name} ended by {described(code)}"
            if kept.deaths <= _DEATHS_MAX:
                pause_s = min(2.0 ** (kept.deaths - 1), _PAUSE_S_MAX)
                kept.again_s = now_s + pause_s
                self._say(f"{said}: again in {pause_s:g} s")
                return
            self._say(
                f"{said}, for the {kept.deaths}th time in a row: it is not started again until the "
                f"next reboot, or `ckptd resume --dir {kept.run.path.parent} {name}`"
            )
        else:
            self._say(f"{name} ended: {_MEANING.get(code, described(code))}")
        self._codes.append(Exit.NOT_DURABLE if undecided else code)
        self._kept.pop(kept.run.path)
        if now_s - self._asked_s < _JUST_NOW_S:
            self._look()  # somebody may have asked for this one while it was ending

    def _signals_came(self) -> None:
        for number in self._signals.take():
            if number != signal.SIGUSR2:
                self._stop()
            elif not self._stopping:
                self._asked_s = time.monotonic()
                self._look()

    def _stop(self) -> None:
        if self._stop_began_s is None:
            self._stop_began_s = time.monotonic()
            if self._stay:
                self._codes.clear()  # what became of earlier jobs was said then
        for kept in self._kept.values():
            if kept.process is not None:
                kept.process.send_signal(signal.SIGTERM)

    # -------------------------------------------------------------- telling

    def _tell_host(self) -> None:
        self._host.alive()
        now_s = time.monotonic()
        if self._stop_began_s is not None and now_s - self._stop_began_s < _STOP_S_MAX:
            self._host.more_time(_MORE_TIME_S)
        self._host.status(lambda: self._summary)
        if now_s - self._status_s >= _STATUS_S:
            self._status_s = now_s
            runs = [kept.run for kept in self._kept.values()]
            self._errands.ask("status", lambda: _summary_of(runs), self._summarised)

    def _summarised(self, summary: str) -> None:
        self._summary = summary


#: With these a supervisor has decided about its job; anything else happened to it.
_DECIDED: Final = (Exit.FINISHED, Exit.USAGE, Exit.LOCKED, Exit.GAVE_UP, Exit.INTERRUPTED)
_MEANING: Final[dict[int, str]] = {
    Exit.FINISHED: "finished",
    Exit.USAGE: "it could not be started",
    Exit.LOCKED: "it runs under another supervisor",
    Exit.GAVE_UP: "given up on, a person must look",
    Exit.NOT_DURABLE: "its newest state could not be saved, an older checkpoint stands",
    Exit.INTERRUPTED: "interrupted, and saved",
}


def _summary_of(runs: list[Run]) -> str:
    """What the jobs do, in one line."""
    if not runs:
        return "no jobs"
    words = []
    for run in runs:
        try:
            holder = run.supervisor()
            if holder is None:
                words.append(f"{run.path.name}: starting")
                continue
            answer = server.ask(holder.socket, "status", _ANSWER_BOUND_S)
            words.append(f"{run.path.name}: {answer.text}")
        except (CkptdError, OSError) as error:
            words.append(f"{run.path.name}: {error}")
    return "; ".join(words)
