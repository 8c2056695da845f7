"""A `ckptd launch` that is watched while it runs: tests wait for a line, never for a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import BOUND_S, Workshop

FAKE = str(Path(__file__).parent / "fake_worker.py")


@pytest.fixture(autouse=True)
def no_leftovers(workshop: Workshop) -> Iterator[None]:
    """A test that fails leaves no process behind either: all of a job's work in its directory."""
    yield
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()) == workshop.path:
                process.kill()


def fake(*options: str) -> tuple[str, ...]:
    """The command of a fake worker."""
    return sys.executable, FAKE, *options


def python(source: str) -> tuple[str, ...]:
    """The command of a few lines of Python that never attach."""
    return sys.executable, "-c", source


class Launched:
    """One `ckptd launch`, from its start to its exit code.

    Attributes:
        output: the lines of its standard output so far.
        messages: the lines of its standard error so far.
    """

    def __init__(
        self, workshop: Workshop, *argv: str, options: tuple[str, ...] = (), **environment: str
    ) -> None:
        self.workshop = workshop
        self.output: list[str] = []
        self.messages: list[str] = []
        self._changed = threading.Condition()
        self._ended = 0
        self.process = subprocess.Popen(
            [*workshop.command(*options), *argv],
            cwd=workshop.path,
            env=workshop.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in [
                (self.process.stdout, self.output),
                (self.process.stderr, self.messages),
            ]
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, lines: list[str]) -> None:
        for line in stream:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def wait_for(self, text: str) -> str:
        """The first line of output or of the messages with this text in it."""
        return self._wait(
            lambda: next((line for line in self.output + self.messages if text in line), ""), text
        )

    def wait_for_step(self, least: int = 0) -> int:
        """The newest step, as soon as the worker has printed one that is not below `least`."""

        def found() -> str:
            newest = max(self.steps(), default=-1)
            return str(newest) if newest >= least else ""

        return int(self._wait(found, f"step {least} or a later one"))

    def _wait(self, found: Callable[[], str], what: str) -> str:
        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended == len(self._readers), BOUND_S)
            line = found()
        assert line, f"{what!r} never came: {self.told()}"
        return line

    def signal(self, number: int) -> Launched:
        """Send a signal to the supervisor alone."""
        self.process.send_signal(number)
        return self

    def descendants(self) -> list[psutil.Process]:
        """All processes of the job."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ends(self) -> int:
        """Its exit code, when it has ended."""
        code = self.process.wait(BOUND_S)
        for reader in self._readers:
            reader.join(BOUND_S)
        return code

    def steps(self) -> list[int]:
        """The steps that the worker printed."""
        return [int(line.split()[1]) for line in self.output if line.startswith("step ")]

    def told(self) -> str:
        """Everything, for a failing test."""
        return "\n".join([*self.output[-20:], *self.messages])

    def kill(self) -> None:
        """SIGKILL to the supervisor alone."""
        self.signal(signal.SIGKILL)
        assert self.ends() == -signal.SIGKILL


def checkpoints(workshop: Workshop, name: str = "job") -> list[int]:
    """The steps of the durable checkpoints."""
    path = workshop.path / "runs" / name / "checkpoints"
    return sorted(int(entry.name.split(".")[0]) for entry in path.iterdir() if entry.name[0] != ".")


def logged(workshop: Workshop, name: str = "job") -> list[int]:
    """The steps in the run's log, over all attempts."""
    lines = (workshop.path / "runs" / name / "log").read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("step ")]


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all of them have ended (a zombie of init's has)."""
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def wait_gone(processes: list[psutil.Process]) -> None:
    """Wait until they have ended."""
    _, alive = psutil.wait_procs(processes, timeout=BOUND_S)
    assert gone(alive), alive


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
