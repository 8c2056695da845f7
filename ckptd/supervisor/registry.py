"""Which jobs of this user are to go on after a reboot, and how each is started again.

$XDG_STATE_HOME/ckptd/MACHINE/jobs/ (~/.local/state) has a link to the directory of each run that
was begun on this machine and has neither finished nor been stopped by its owner. What it takes to
start it again lies in the run's directory: launch.json, which each run has.

Rules:

1. A link is made before the command is started first, and removed after the run has ended for good.
   A crash in between leaves a job that is started once more and finds that it has ended; it never
   leaves one that is forgotten.
2. A run that its host starts again by itself (a Slurm job, a service of its own) has no link: it
   would be started twice.
3. A link to nowhere is kept: its disk may not be mounted yet.
4. Only a person makes a link. What is started again finds it or does not start: its owner may have
   stopped it in between. The link is looked for under the run's lock, and whoever removes it looks
   at the lock after that, so that one of the two sees the other.
5. A home may be shared by several machines: each has its own links, and its own service.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import msgspec
import xxhash

from ckptd.errors import CkptdError, LockedError, UsageError
from ckptd.host import children, systemd
from ckptd.host.disk import RealDisk
from ckptd.supervisor.run import Run, boot_id, load, replace, still_runs

_OWN: Final = (*systemd.OWN_VARIABLES, "CKPTD_SOCKET", "CKPTD_REMOTE")
#: The option of `ckptd launch` by which it refuses a run that its owner has stopped meanwhile.
IF_WANTED: Final = "--if-wanted"
_PRIVATE: Final = 0o700
_LAUNCH: Final = "launch.json"
_MACHINE_ID: Final = Path("/etc/machine-id")
_NO_ID: Final = ("", "uninitialized")  # an image that was not booted yet, a container


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
        self.path = Path(state, "ckptd", machine(), "jobs")
        self._service = self.path.with_name("service.json")

    def add(self, run: Run) -> None:
        """From now on the run is one that goes on after a reboot.

        Raises:
            OSError: it can't be written down.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        link = self._link(run)
        if not link.is_symlink():
            link.symlink_to(run.path)
            RealDisk().sync_directory(self.path)

    def has(self, run: Run) -> bool:
        """Whether the run is one that goes on after a reboot."""
        return self._link(run).is_symlink()

    def remove(self, run: Run) -> bool:
        """The run has ended for good, or its owner does not want it to go on; whether it was in."""
        try:
            self._link(run).unlink()
        except FileNotFoundError:
            return False
        return True

    def runs(self) -> list[Run]:
        """All runs that are to go on, also those whose directory can't be seen now.

        Raises:
            OSError: nobody can tell.
        """
        found = []
        if self.path.is_dir():
            for link in sorted(self.path.iterdir()):
                with suppress(FileNotFoundError):  # stopped by its owner in this moment
                    found += [Run(link.readlink())] if link.is_symlink() else []
        return found

    def service(self) -> ServiceFile | None:
        """Who keeps the jobs; None: nobody does."""
        try:
            found = load(self._service, ServiceFile)
        except CkptdError:
            return None  # who wrote this was cut off, or its disk was: the next one writes it anew
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


def machine() -> str:
    """What tells this machine from others that share a home with it."""
    try:
        found = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    return os.uname().nodename if found in _NO_ID else found


def note(run: Run, options: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write down how a run was started.

    Raises:
        OSError: it can't be written.
    """
    kept = {name: value for name, value in environment.items() if name not in _OWN}
    replace(run.path / _LAUNCH, LaunchFile(sys.executable, list(options), kept), mode=0o600)


def launched(run: Run) -> LaunchFile | None:
    """How a run was started last; None: nobody wrote it down.

    Raises:
        CkptdError: launch.json is damaged.
    """
    return load(run.path / _LAUNCH, LaunchFile)


def command_for(run: Run, *marks: str) -> tuple[list[str], str, dict[str, str]]:
    """What starts a run again: the command, its working directory and its environment.

    Args:
        run: the run.
        marks: options of this start alone.

    Raises:
        UsageError: it was never launched by a ckptd that wrote it down, or its directory is gone.
    """
    job, launch = run.job(), launched(run)
    if job is None or launch is None:
        raise UsageError(
            f"{run.path}: nobody wrote down how this run was started; start it again with the "
            "line that it was started with"
        )
    if not Path(job.cwd).is_dir():
        raise UsageError(f"{run.path}: its working directory {job.cwd} is not there")
    head = [launch.python, "-m", "ckptd", "launch"]
    where = ["--dir", str(run.path.parent), "--name", run.path.name]
    return [*head, *where, *launch.options, *marks, "--", *job.argv], job.cwd, launch.environment


def start(
    run: Run, messages: IO[bytes] | None = None, *, if_wanted: bool = False
) -> subprocess.Popen[bytes]:
    """Start a run again in the background; its supervisor passes the job's output into the log.

    Args:
        run: the run.
        messages: where its supervisor speaks; None: where we do.
        if_wanted: only if its link is still there by then.

    Raises:
        UsageError: see `command_for`.
        OSError: it can't be started.
    """
    argv, cwd, environment = command_for(run, *([IF_WANTED] if if_wanted else []))
    return subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=messages,
        start_new_session=True,
    )
