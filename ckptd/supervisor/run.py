"""A run's directory: what to run, who runs it, and where things lie.

ckptd-runs/NAME/
  job.json          what to run: argv, working directory, environment that decides about bits
  launch.json       how it was started last (`registry`)
  lock              held by the supervisor and inherited by the worker: no second copy, ever
  supervisor.json   who holds it: process, start time, host, socket
  requeues.json     how often it was interrupted in a row without getting anywhere
  attempts/         a file for each attempt: the largest number may publish
  journal.jsonl     everything that happened, append-only
  log               the command's output over all attempts
  checkpoints/
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import filelock
import msgspec

from ckptd.errors import CkptdError, JobChangedError, LockedError, UsageError
from ckptd.host import children, slurm, systemd
from ckptd.host.disk import Disk, RealDisk
from ckptd.host.host import Host
from ckptd.store import fence

#: Variables that decide about thread counts and thereby about the order of additions.
THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_RECORDED: Final = (*THREAD_VARIABLES, "CUBLAS_WORKSPACE_CONFIG")

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_POLL_S: Final = 0.05
_REPLACE_S: Final = 20.0  # some looks of the old copy at the fence (`loop`)

S = TypeVar("S", bound=msgspec.Struct)


class JobFile(msgspec.Struct, frozen=True):
    """job.json: what to run.

    Attributes:
        hash_seed: PYTHONHASHSEED of every attempt.
        environment: variables that decide about bits, as they were at the first launch; None:
        unset. cpus: usable processors at the first launch. fixed_addresses: whether memory
        addresses are the same in every attempt. facts: what the first attempt's worker
        said of itself (`Hello.environment`); None: none yet.
    """

    name: str
    argv: list[str]
    cwd: str
    hash_seed: str
    environment: dict[str, str | None]
    cpus: int
    ckptd: str
    fixed_addresses: bool = False
    facts: dict[str, str] | None = None


class SupervisorFile(msgspec.Struct, frozen=True):
    """supervisor.json: who runs the job; `started` makes a process id unique on its host.

    Attributes:
        node: the scheduler's name of the machine, of which several may be one machine.
        job: what the scheduler calls the job.
        restart: how often the scheduler had started it before.
    """

    pid: int
    started: float
    host: str
    boot: str
    socket: str
    child: int | None = None
    child_started: float | None = None
    node: str | None = None
    job: str | None = None
    restart: int = 0

    def alive(self) -> bool | None:
        """Whether that supervisor runs; None: on another machine, nobody can tell from here."""
        here = slurm.node()
        elsewhere = self.node is not None and here is not None and self.node != here
        if elsewhere or self.host != os.uname().nodename:
            return None
        return still_runs(self.pid, self.started, self.boot)


class RequeuesFile(msgspec.Struct, frozen=True):
    """requeues.json: interruptions in a row before a new step became durable."""

    without_progress: int


_FILES: Final[dict[type, str]] = {
    JobFile: "job.json",
    SupervisorFile: "supervisor.json",
    RequeuesFile: "requeues.json",
}


class Run:
    """One run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """Everything that happened."""
        return self.path / "journal.jsonl"

    @property
    def log(self) -> Path:
        """The command's output."""
        return self.path / "log"

    def job(self) -> JobFile | None:
        """What to run; None before the first launch."""
        return load(self.path / "job.json", JobFile)

    def supervisor(self) -> SupervisorFile | None:
        """Who runs it, or ran it last without ending in order."""
        return load(self.path / "supervisor.json", SupervisorFile)

    def requeues(self) -> int:
        """How often it was interrupted in a row before a new step became durable."""
        found = load(self.path / "requeues.json", RequeuesFile)
        return 0 if found is None else found.without_progress

    def write(self, content: JobFile | SupervisorFile | RequeuesFile) -> None:
        """Replace a file of this run; a crash leaves the old one or the new one."""
        replace(self.path / _FILES[type(content)], content)

    def claim_attempt(self) -> int:
        """Claim the next attempt's number; what has a smaller one may publish nothing any more.

        Raises:
            FencedError, OSError: see `fence.claim`.
        """
        return fence.claim(RealDisk(), self.path, _who())

    def forget_supervisor(self, own: SupervisorFile) -> None:
        """The supervisor ends in order. What a newer one wrote elsewhere is left alone."""
        if self.supervisor() == own:
            (self.path / "supervisor.json").unlink(missing_ok=True)


def find(directory: Path, name: str) -> Run:
    """An existing run.

    Raises:
        UsageError: there is none of this name; says which there are.
    """
    run = Run(directory / check_name(name))
    if not run.path.is_dir():
        others = ", ".join(sorted(path.name for path in runs(directory))) or "none"
        raise UsageError(f"no run called {name!r} in {directory}; there are: {others}")
    return run


def runs(directory: Path) -> list[Path]:
    """The directories of all runs."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if (path / "job.json").is_file())


def check_name(name: str) -> str:
    """A run's name, which is also its directory's.

    Raises:
        UsageError: it can't be one.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} can't be a run's name: letters, digits, '_', '-' and '.', at most 100, "
            "not beginning with '.' or '-'"
        )
    return name


def default_name(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """A name for a command: that of the Slurm job, else that of its script.

    Raises:
        UsageError: the command has no word that could be a name.
    """
    if slurm.JOB_VARIABLE in environment:
        task = slurm.task(environment)
        name = f"slurm-{slurm.job_id(environment)}"
        return name if task is None else f"{name}-task{task}"
    scripts = [Path(word).stem for word in argv if word.endswith((".py", ".sh"))]
    if scripts:
        return check_name(scripts[0])
    if "-m" in argv[:-1]:
        return check_name(argv[argv.index("-m") + 1])
    return check_name(Path(argv[0]).name)


def describe_job(
    name: str, argv: Sequence[str], cwd: Path, environment: Mapping[str, str], version: str
) -> JobFile:
    """What a first launch records."""
    return JobFile(
        name=name,
        argv=list(argv),
        cwd=str(cwd),
        # A fixed seed makes the order of sets the same in every attempt; which one is fixed matters
        # to nobody, since a plain run draws one at random.
        hash_seed=environment.get("PYTHONHASHSEED", "0"),
        environment={key: environment.get(key) for key in _RECORDED},
        cpus=len(os.sched_getaffinity(0)),
        ckptd=version,
    )


def check_unchanged(before: JobFile, now: JobFile) -> None:
    """Refuse to go on with another command or another working directory.

    Raises:
        JobChangedError: shows both.
    """
    changed = []
    if before.argv != now.argv:
        changed.append(
            f"command: was  {shlex.join(before.argv)}\n         now  {shlex.join(now.argv)}"
        )
    if before.cwd != now.cwd:
        changed.append(f"directory: was  {before.cwd}\n           now  {now.cwd}")
    if changed:
        raise JobChangedError(
            f"the run {before.name!r} exists, with another command or working directory:\n  "
            + "\n  ".join(changed)
            + "\nGo on with the new one: --accept-changes. Start over: --fresh. A new run: --name."
        )


def environment_for(job: JobFile, own: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """The command's environment: ours, with what decides about bits as at the first launch.

    Returns:
        The environment, and what to say about it.
    """
    passed_on = {key: value for key, value in own.items() if key not in systemd.OWN_VARIABLES}
    environment = {**passed_on, "PYTHONHASHSEED": job.hash_seed}
    environment.setdefault("PYTHONUNBUFFERED", "1")  # so that output comes when it is written
    for key, value in job.environment.items():
        environment.pop(key, None)
        if value is not None:
            environment[key] = value
    cpus = len(os.sched_getaffinity(0))
    if cpus == job.cpus:
        return environment, None
    threads = (job.facts or {}).get("threads", str(job.cpus))
    for key in THREAD_VARIABLES:
        environment.setdefault(key, threads)
    return environment, (
        f"{cpus} processors are usable here, {job.cpus} were at the first launch: "
        f"thread counts are kept at {threads}"
    )


def create(run: Run, disk: Disk) -> None:
    """Make a run's directory and those above it, where they are missing; no power cut loses them.

    Raises:
        OSError: the disk refused.
    """
    parent, fresh = run.path.parent, _fresh(run)
    names = disk.names(parent)
    if fresh.name in names and run.path.name not in names:
        disk.rename(fresh, run.path)  # `set_old_aside` was killed in between
    _make(disk, run.path)
    # Always: an earlier launch may have been killed in between.
    disk.sync_directory(parent)


def _make(disk: Disk, path: Path) -> None:
    with suppress(FileExistsError):
        try:
            disk.make_directory(path)
        except FileNotFoundError:
            _make(disk, path.parent)
            disk.make_directory(path)
        disk.sync_directory(path.parent)


def set_old_aside(run: Run, disk: Disk) -> Path:
    """Put a new, empty directory in the place of a run's, for `--fresh`; nothing is deleted.

    The new one goes on with the numbers of the attempts: an old copy of the job, on a machine that
    was given up, must not take it for its own.

    Returns:
        Where the old one is.

    Raises:
        OSError: the disk refused.
    """
    parent, fresh = run.path.parent, _fresh(run)
    names = disk.names(parent)
    if fresh.name in names:
        disk.remove_tree(fresh)
    disk.make_directory(fresh)
    fence.carry_over(disk, run.path, fresh, _who())
    disk.sync_directory(parent)
    number = 1
    while (old := f"{run.path.name}.old-{number}") in names:
        number += 1
    disk.rename(run.path, parent / old)
    # A power cut must not find the new one alone. Where it finds neither, `create` goes on.
    disk.sync_directory(parent)
    disk.rename(fresh, run.path)
    disk.sync_directory(parent)
    return parent / old


def _fresh(run: Run) -> Path:
    """Where a new directory is prepared; the name can't be a run's."""
    return run.path.with_name(f".{run.path.name}.fresh")


def _who() -> str:
    return f"{slurm.node() or os.uname().nodename} {os.getpid()}\n"


def still_runs(pid: int, started: float, boot: str) -> bool:
    """Whether the process of this machine that had this id, start and boot runs still."""
    return boot == boot_id() and children.started_s(pid) == started


def boot_id() -> str:
    """What makes process ids unique over reboots."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


# ------------------------------------------------------------------ the lock


def lock(
    run: Run,
    host: Host,
    *,
    grace_s: float,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Take the run's lock; a worker that outlived its supervisor may flush first.

    Args:
        run: the run.
        host: what started us: it may have given up the copy that holds the lock.
        grace_s: how long such a worker may take before it is killed.
        say: tells the user.
        sleep: between two looks; what it raises ends the wait.

    Returns:
        The lock's descriptor: the lock is held while any copy of it is open. Not held, but of an
        older copy that was fenced off, when that is on a machine that can't let go of it any more.

    Raises:
        LockedError: another supervisor runs the job; says where.
    """
    descriptor = os.open(run.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        locked = _try_lock(descriptor)
        given_up = _given_up(run, host)
        if given_up is not None:
            _replace(run, given_up, descriptor, say, sleep)
        elif not locked:
            _wait_for_orphan(run, descriptor, grace_s, say, sleep)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(run: Run) -> bool:
    """Whether a supervisor, or a worker that outlived one, holds the run's lock."""
    try:
        descriptor = os.open(run.path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _given_up(run: Run, host: Host) -> SupervisorFile | None:
    """The supervisor in whose place the scheduler has started us, if it may still run.

    A scheduler that loses touch with a machine starts the job elsewhere while the old copy goes on.
    """
    holder = run.supervisor()
    if holder is None or holder.job is None or holder.alive() is False:
        return None
    return holder if holder.job == host.job and holder.restart < host.restart else None


def _replace(
    run: Run,
    holder: SupervisorFile,
    descriptor: int,
    say: Callable[[str], None],
    sleep: Callable[[float], None],
) -> None:
    """Fence the old copy off, and give it some time to notice and to end.

    Locks of some network file systems hold on one machine only, so having the lock says nothing.
    An old copy that ends removes supervisor.json. One whose machine is dead does neither; what it
    may still hold is not waited for any longer, since it can't publish any more.
    """
    where = holder.node or holder.host
    say(
        f"{holder.job} was started again in the place of the copy on {where} (process "
        f"{holder.pid}); that one may save nothing any more, and has {_REPLACE_S:g} s to end"
    )
    run.claim_attempt()
    until_s = time.monotonic() + _REPLACE_S
    while run.supervisor() == holder or not _try_lock(descriptor):
        if time.monotonic() >= until_s:
            say(f"the copy on {where} did not end, or its machine is lost: going on without it")
            return
        sleep(_POLL_S)


def _wait_for_orphan(
    run: Run,
    descriptor: int,
    grace_s: float,
    say: Callable[[str], None],
    sleep: Callable[[float], None],
) -> None:
    holder = run.supervisor()
    orphaned = holder is not None and holder.alive() is False and holder.boot == boot_id()
    if holder is None or not orphaned:
        where = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
        raise LockedError(
            f"the run {run.path.name!r} is held by {where}: it is running already. "
            f"Look at it with `ckptd status {run.path.name}`, stop it with `ckptd stop "
            f"{run.path.name}`"
        )
    # A supervisor that was killed right after it had started its command had not recorded it yet.
    worker = "its worker" if holder.child is None else f"its worker (process {holder.child})"
    say(
        f"the supervisor of this run (process {holder.pid}) was killed; {worker} has up to "
        f"{grace_s:g} s to save itself"
    )
    if _lock_within(descriptor, grace_s, sleep):
        return
    if holder.child is not None:
        say(f"the worker did not end: killing process {holder.child} and its descendants")
        assert holder.child_started is not None, "recorded together with the process id"
        children.kill_orphans(holder.child, holder.child_started)
    if holder.child is None or not _lock_within(descriptor, grace_s, sleep):
        raise LockedError(
            f"the run {run.path.name!r} is still locked by a process of its killed supervisor; "
            f"find it with `fuser {run.path / 'lock'}`"
        )


def _lock_within(descriptor: int, bound_s: float, sleep: Callable[[float], None]) -> bool:
    until_s = time.monotonic() + bound_s
    while not _try_lock(descriptor):
        if time.monotonic() >= until_s:
            return False
        sleep(_POLL_S)
    return True


def _try_lock(descriptor: int) -> bool:
    # The descriptor must be handed to the worker, so filelock's own file handling can't be used.
    return filelock.lock_descriptor(descriptor, blocking=False)


def replace(path: Path, content: msgspec.Struct, mode: int = 0o644) -> None:
    """Write a file anew; a crash leaves the old one or the new one."""
    disk, temporary = RealDisk(), path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    disk.write(temporary, msgspec.json.format(msgspec.json.encode(content)), mode)
    disk.sync(temporary)
    disk.rename(temporary, path)
    disk.sync_directory(path.parent)


def load(path: Path, kind: type[S]) -> S | None:
    """A file's content; None: there is no such file.

    Raises:
        CkptdError: it is damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise CkptdError(
            f"{path} is damaged: {error}. Restore it from a backup, or start over with --fresh "
            "(the old directory is kept)"
        ) from error
