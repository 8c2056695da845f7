"""Which jobs of this user are to go on after a reboot, and how each is started again.

$XDG_STATE_HOME/ckptd/jobs/ (~/.local/state) has a link to the directory of each run that was begun
and has neither finished nor been stopped by its owner. What it takes to start it again lies in the
run's directory: launch.json.

Rules:

1. A link is made before the command is started first, and removed after the run has ended for good.
   A crash in between leaves a job that is started once more and finds that it has ended; it never
   leaves one that is forgotten.
2. A run that its host starts again by itself (a Slurm job, a service of its own) has no link: it
   would be started twice.
3. A link to nowhere is kept: its disk may not be mounted yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import msgspec
import xxhash

from ckptd.errors import LockedError, UsageError
from ckptd.host import children, systemd
from ckptd.host.disk import RealDisk
from ckptd.supervisor.run import Run, boot_id, load, replace, still_runs

_OWN: Final = (*systemd.OWN_VARIABLES, "CKPTD_SOCKET")
_PRIVATE: Final = 0o700
_LAUNCH: Final = "launch.json"


class LaunchFile(msgspec.Struct, frozen=True):
    """launch.json: how the run was started last. It is the owner's alone: keys may be in it.

    Attributes:
        python: the interpreter that has this ckptd.
        options: of `ckptd launch`, as words.
        environment: all of it.
    """

    python: str
    options: list[str]
    environment: dict[str, str]


class ServiceFile(msgspec.Struct, frozen=True):
    """Who keeps this user's jobs: `ckptd resume --all --stay`."""

    pid: int
    started: float
    boot: str

    def alive(self) -> bool:
        """Whether it runs."""
        return still_runs(self.pid, self.started, self.boot)


class Registry:
    """This user's jobs.

    Args:
        environment: says where: XDG_STATE_HOME, else HOME.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        home = environment.get("HOME") or str(Path.home())
        state = environment.get("XDG_STATE_HOME") or f"{home}/.local/state"
        self.path = Path(state, "ckptd", "jobs")
        self._service = self.path.with_name("service.json")

    def add(self, run: Run, options: Sequence[str], environment: Mapping[str, str]) -> None:
        """From now on the run is one that goes on after a reboot.

        Raises:
            OSError: it can't be written down.
        """
        kept = {name: value for name, value in environment.items() if name not in _OWN}
        launch = LaunchFile(sys.executable, list(options), kept)
        replace(run.path / _LAUNCH, launch, mode=0o600)
        self.path.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        link = self._link(run)
        if not link.is_symlink():
            link.symlink_to(run.path)
            RealDisk().sync_directory(self.path)

    def remove(self, run: Run) -> bool:
        """The run has ended for good, or its owner does not want it to go on; whether it was in."""
        try:
            self._link(run).unlink()
        except FileNotFoundError:
            return False
        return True

    def runs(self) -> list[Run]:
        """All runs that are to go on, also those whose directory can't be seen now."""
        if not self.path.is_dir():
            return []
        return [Run(link.readlink()) for link in sorted(self.path.iterdir()) if link.is_symlink()]

    def service(self) -> ServiceFile | None:
        """Who keeps the jobs; None: nobody does."""
        found = load(self._service, ServiceFile)
        return found if found is not None and found.alive() else None

    def serve(self) -> None:
        """This process keeps the jobs from now on.

        Raises:
            LockedError: another one does.
        """
        other, pid = self.service(), os.getpid()
        if other is not None:
            raise LockedError(f"process {other.pid} keeps this user's jobs already")
        started = children.started_s(pid)
        assert started is not None, "we run"
        self.path.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        replace(self._service, ServiceFile(pid, started, boot_id()))

    def _link(self, run: Run) -> Path:
        return self.path / f"{run.path.name}-{xxhash.xxh3_64(os.fsencode(run.path)).hexdigest()}"


def command_for(run: Run) -> tuple[list[str], str, dict[str, str]]:
    """What starts a run again: the command, its working directory and its environment.

    Raises:
        UsageError: it was never launched by a ckptd that wrote it down, or its directory is gone.
    """
    job, launch = run.job(), load(run.path / _LAUNCH, LaunchFile)
    if job is None or launch is None:
        raise UsageError(
            f"{run.path}: nobody wrote down how this run was started; start it again with the "
            "line that it was started with"
        )
    if not Path(job.cwd).is_dir():
        raise UsageError(f"{run.path}: its working directory {job.cwd} is not there")
    head = [launch.python, "-m", "ckptd", "launch"]
    where = ["--dir", str(run.path.parent), "--name", run.path.name]
    return [*head, *where, *launch.options, "--", *job.argv], job.cwd, launch.environment


def start(run: Run, messages: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a run again in the background; its supervisor passes the job's output into the log.

    Args:
        run: the run.
        messages: where its supervisor speaks; None: where we do.

    Raises:
        UsageError: see `command_for`.
        OSError: it can't be started.
    """
    argv, cwd, environment = command_for(run)
    return subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=messages,
        start_new_session=True,
    )
