"""What could go wrong here: this machine, this directory, this run. Each finding has its mending.

Rule: what is looked at is tried, not guessed from its name. A file system that calls itself NFS may
have working locks, and one that does not may lack them. Only whether other nodes see a directory
can't be tried from here.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import filelock

from ckptd.host import disk, memory, systemd
from ckptd.host.disk import RealDisk
from ckptd.host.host import Host
from ckptd.store import store
from ckptd.supervisor import journal, launchers, registry
from ckptd.supervisor.policy import duration, sized, space_short
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.run import Run

_BLOCK: Final = 4096
_SLOW_SHARE: Final = 0.5  # of the grace, that a flush may take before it is worth a word


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` None: it is as it should be."""

    what: str
    mend: str | None = None


def of_host(
    host: Host, jobs: Registry, units: Path, flush_s: float | None = None
) -> Iterator[Finding]:
    """What starts a job again, and whether it will.

    Args:
        host: what started us.
        jobs: this user's.
        units: where this user's own units lie.
        flush_s: what a checkpoint takes; None: that is not known.
    """
    described = host.described()
    if described:
        yield Finding(f"host: {described}")
        yield from (Finding(what, mend) for what, mend in host.doubts(flush_s))
        return
    service = jobs.service()
    if service is not None:
        yield Finding(f"service: process {service.pid} goes on with jobs after a reboot")
        yield from (Finding(*one) for one in systemd.stop_limits(service.pid, flush_s))
    else:
        yield Finding(
            "service: nothing goes on with this user's jobs after a reboot",
            "ckptd install-service",
        )
    if (units / "ckptd.service").exists() and not systemd.lingers(getpass.getuser()):
        yield Finding(
            "lingering: the service starts when you log in, not at boot",
            f"loginctl enable-linger {getpass.getuser()}",
        )


def of_directory(directory: Path, nodes: int = 1) -> Iterator[Finding]:
    """Whether a directory's file system does what runs need.

    Args:
        directory: where runs lie, or will.
        nodes: on how many of them a job runs.
    """
    there = next(one for one in (directory, *directory.parents) if one.is_dir())
    local = disk.local_kind(there) if nodes > 1 else None
    if local is not None:
        yield Finding(
            f"nodes: {there} is on {local}, which as a rule is this node's alone, of {nodes}",
            "use another --dir, on a file system that all nodes share",
        )
    elsewhere = "use another --dir, on a local disk"
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".ckptd-doctor-") as name:
            place = Path(name)
            yield _locks(place, elsewhere)
            yield _direct(place)
            yield _links(place)
            yield _renames(place, elsewhere)
    except OSError as error:
        yield Finding(f"{there} can't be written: {error.strerror}", elsewhere)


def _locks(place: Path, elsewhere: str) -> Finding:
    first = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    second = os.open(place / "lock", os.O_RDWR)
    try:
        if not filelock.lock_descriptor(first, blocking=False):
            return Finding("locks: none can be had here; two copies of a job could run", elsewhere)
        if filelock.lock_descriptor(second, blocking=False):
            return Finding("locks: they hold nobody off; two copies of a job could run", elsewhere)
    except OSError as error:
        return Finding(f"locks: {error.strerror}; two copies of a job could run", elsewhere)
    finally:
        os.close(first)
        os.close(second)
    return Finding("locks: one copy of a job at a time")


def _direct(place: Path) -> Finding:
    try:
        os.close(os.open(place / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return Finding("direct writes: refused here; checkpoints go through the page cache, slower")
    return Finding("direct writes: as fast as the disk is")


def _links(place: Path) -> Finding:
    (place / "one").write_bytes(b"1")
    if RealDisk().link(place / "one", place / "two"):
        return Finding("hard links: what did not change is not written again")
    return Finding("hard links: refused here; also what did not change is written again")


def _renames(place: Path, elsewhere: str) -> Finding:
    (place / "old").write_bytes(b"old")
    (place / "new").write_bytes(b"new" * _BLOCK)
    RealDisk().rename(place / "new", place / "old")
    RealDisk().sync_directory(place)
    if (place / "old").stat().st_size != len(b"new") * _BLOCK:
        return Finding("renames: a file was not replaced whole", elsewhere)
    return Finding("renames: a checkpoint is there whole, or not at all")


def of_machine(gpus: int) -> Iterator[Finding]:
    """What there is to compute with."""
    cpus = len(os.sched_getaffinity(0))
    yield Finding(f"machine: {cpus} processors, {gpus} GPUs, {sized(memory.available())} free")


def gpus() -> int:
    """How many NVIDIA GPUs this process may open."""
    return sum(os.access(path, os.R_OK) for path in Path("/dev").glob("nvidia[0-9]*"))


def slowest(run: Run) -> float | None:
    """Seconds that a run's slowest checkpoint took; None: it has none."""
    took = [e.get("seconds", 0.0) for e in journal.read(run.journal) if e["event"] == "durable"]
    return max(took, default=None)


def launched_with(run: Run) -> dict[str, str]:
    """The options with which a run was launched last, and their values.

    Raises:
        CkptdError: launch.json is damaged.
    """
    launch = registry.launched(run)
    words = [] if launch is None else launch.options
    return dict(pairwise([*words, ""]))  # a flag's value is the next option, and nobody asks for it


def of_run(run: Run, keep: int, grace_s: float, *, memory_tier: bool = True) -> Iterator[Finding]:
    """Whether a run has the memory, the space and the time that it was seen to need.

    Args:
        run: the run.
        keep: how many checkpoints it keeps.
        grace_s: how long it has at a stop.
        memory_tier: whether its newest snapshot is to stay in memory.
    """
    job = run.job()
    option = None if job is None else launchers.restarts(job.argv)
    if option is not None:
        what = f"launcher: {option} has torchrun start ranks again, which ckptd turns away"
        yield Finding(what, "leave it at 0: ckptd starts the whole job again")
    rows = [row for row in store.listing(RealDisk(), run.checkpoints) if row.step >= 0]
    if not rows:
        yield Finding("run: it has no checkpoint yet, so nothing is known of what it needs")
        return
    length, free = rows[0].length, memory.available()
    need = f"memory: two states of {sized(length)}, {sized(free)} are free"
    if memory_tier and 2 * length > free:
        yield Finding(
            f"{need}: after a crash it starts again from the disk",
            "ask for more memory (Slurm: --mem), or set --memory-tier off, which is then said",
        )
    else:
        yield Finding(need)
    short = space_short(length, keep, len(rows), disk.free(run.path))
    yield (
        Finding(f"space: {keep} checkpoints fit")
        if short is None
        else Finding(f"space: {short}", f"free some space under {run.path}")
    )
    slowest_s = slowest(run)
    if slowest_s is not None:
        what = (
            f"time: the slowest checkpoint took {duration(slowest_s)}, the grace is {grace_s:g} s"
        )
        enough = slowest_s < _SLOW_SHARE * grace_s
        yield Finding(
            what, None if enough else f"launch it with --grace {max(2 * slowest_s, 1):.0f} or more"
        )
