"""Several jobs of one user, each under a supervisor of its own: what `ckptd resume --all` runs.

Rules:

1. A supervisor is a process of its own. One that is killed takes no other with it, and is started
   again.
2. A stop is passed on to every supervisor, and all of them are waited for: each has a deadline of
   its own, and the host is asked for more time meanwhile.
3. What a supervisor ended with is its job's end: nothing is started again here that it did not want
   to have started again.
"""

from __future__ import annotations

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
_PAUSE_S_MAX: Final = 60.0


@dataclass
class _Kept:
    """One job: its supervisor, and how often that was killed."""

    run: Run
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    deaths: int = 0
    again_s: float = 0.0


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
        self._codes: list[int] = []
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._signals, self._errands = Signals(), Errands(say)
        self._status_s = 0.0
        self._summary = ""

    def run(self) -> int:
        """Keep the jobs until they have ended or a signal comes; the exit code."""
        self._selector.register(self._signals, selectors.EVENT_READ, self._signals_came)
        self._selector.register(self._errands, selectors.EVENT_READ, self._errands.deliver)
        try:
            self._start_new()
            self._host.ready()
            while self._kept or (self._stay and not self._stopping):
                for key, _ in self._selector.select(_TURN_S):
                    key.data()
                self._start_again()
                self._tell_host()
        finally:
            self._signals.close()
            self._selector.close()
        return next((code for code in self._codes if code != Exit.FINISHED), Exit.FINISHED)

    def _start_new(self) -> None:
        for run in self._registry.runs():
            if run.path in self._kept:
                continue
            if run.job() is None:
                self._say(f"{run.path} is not there (a disk that is not mounted?): left out")
                continue
            holder = run.supervisor()
            if holder is not None and holder.alive():
                self._say(f"{run.path.name} runs already (process {holder.pid})")
                continue
            self._kept[run.path] = kept = _Kept(run)
            self._start(kept)

    def _start(self, kept: _Kept) -> None:
        try:
            kept.process = registry.start(kept.run)
        except (CkptdError, OSError) as error:
            self._say(f"{kept.run.path.name} can't be started: {error}")
            self._kept.pop(kept.run.path)
            self._codes.append(Exit.USAGE)
            return
        kept.pidfd = os.pidfd_open(kept.process.pid)
        self._selector.register(kept.pidfd, selectors.EVENT_READ, lambda: self._ended(kept))
        self._say(f"{kept.run.path.name} goes on, under process {kept.process.pid}")

    def _ended(self, kept: _Kept) -> None:
        assert kept.process is not None, "only then is it watched"
        code = kept.process.wait()
        self._selector.unregister(kept.pidfd)
        os.close(kept.pidfd)
        kept.process = None
        name = kept.run.path.name
        if code < 0 and not self._stopping:
            # A supervisor that was killed decided nothing.
            pause_s = min(2.0**kept.deaths, _PAUSE_S_MAX)
            kept.deaths, kept.again_s = kept.deaths + 1, time.monotonic() + pause_s
            self._say(
                f"the supervisor of {name} ended by {described(code)}: again in {pause_s:g} s"
            )
            return
        self._say(f"{name} ended: {_MEANING.get(code, described(code))}")
        self._codes.append(code)
        self._kept.pop(kept.run.path)

    def _start_again(self) -> None:
        for kept in [*self._kept.values()]:
            if kept.process is None and self._stopping:
                self._kept.pop(kept.run.path)
            elif kept.process is None and time.monotonic() >= kept.again_s:
                self._start(kept)

    def _signals_came(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGUSR2:
                self._start_new()
            else:
                self._stop()

    def _stop(self) -> None:
        self._stopping = True
        for kept in self._kept.values():
            if kept.process is not None:
                kept.process.send_signal(signal.SIGTERM)

    def _tell_host(self) -> None:
        self._host.alive()
        if self._stopping:
            self._host.more_time(_MORE_TIME_S)
        self._host.status(lambda: self._summary)
        if time.monotonic() - self._status_s >= _STATUS_S:
            self._status_s = time.monotonic()
            runs = [kept.run for kept in self._kept.values()]
            self._errands.ask("status", lambda: _summary_of(runs), self._summarised)

    def _summarised(self, summary: str) -> None:
        self._summary = summary


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
