"""Memory shared between processes: memfds, which have no name and vanish with their user.

A container's /dev/shm may be small, and Python's resource tracker unlinks named segments when one
of their users dies; a memfd knows neither.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def make(name: str, length: int) -> int:
    """A memfd of `length` zero bytes; the caller closes it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, length)
    return descriptor


def limit() -> int | None:
    """The largest memfd that this process may make, in bytes: `ulimit -f` counts it as a file."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft


def available() -> int:
    """Bytes that this process may still use: of the machine's, and of its control group's limit."""
    free = psutil.virtual_memory().available
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """What is left up to the limit of each control group above this process (version 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        own = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    group = Path("/sys/fs/cgroup") / own.lstrip("/")
    for path in (group, *group.parents):
        with suppress(OSError, ValueError):  # no limit, or "max"
            limit = int((path / "memory.max").read_text(encoding="ascii"))
            yield limit - int((path / "memory.current").read_text(encoding="ascii"))


class OomWatch:
    """Whether the kernel has killed processes for want of memory since this was made."""

    def __init__(self) -> None:
        self._before = _oom_kills()

    def found(self) -> str | None:
        """What to say of it; None: it has killed none."""
        now = _oom_kills()
        groups = [name for name, kills in now.items() if kills > self._before.get(name, kills)]
        own = [name for name in groups if name]
        if own:
            limit = _limit_of(Path(own[0]))
            of = "" if limit is None else f", which may use {limit >> 20} MiB"
            return f"out of memory: the kernel killed a process of its control group{of}"
        if groups:
            return "out of memory: the kernel killed a process on this machine meanwhile"
        return None


def _oom_kills() -> dict[str, int]:
    """Processes killed so far, by control group above this process; "": on the whole machine."""
    files = {"": Path("/proc/vmstat")}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                group = Path("/sys/fs/cgroup") / path.lstrip("/")
                files[str(group)] = group / "memory.events"
            elif "memory" in controllers.split(","):
                group = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
                files[str(group)] = group / "memory.oom_control"
    kills = {}
    for name, file in files.items():
        with suppress(OSError):  # a container that does not show its control group
            for line in file.read_text(encoding="ascii").splitlines():
                if line.startswith("oom_kill "):
                    kills[name] = int(line.split()[1])
    return kills


def _limit_of(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # of the other version, or "max"
            limit = int((group / name).read_text(encoding="ascii"))
            if limit < psutil.virtual_memory().total:
                return limit
    return None


def shared(descriptor: int, length: int) -> memoryview:
    """A memfd's bytes, writable, shared with everyone who maps it; lives as long as it is used."""
    return memoryview(mmap.mmap(descriptor, length))


def private(descriptor: int) -> memoryview:
    """A file's bytes; what is written there stays this process's own and reaches no file."""
    length = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY) if length else b"")


def mapped(path: Path) -> memoryview:
    """The same for a regular file by its path; a symbolic link is not followed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        return private(file.fileno())


@contextmanager
def pieces(descriptor: int, places: Mapping[str, slice]) -> Iterator[dict[str, memoryview]]:
    """Named pieces of a memfd's bytes, read-only, while the context lasts."""
    length = os.fstat(descriptor).st_size
    # The mapping is not closed here: after an error the frames of whoever raised it still look into
    # it, and closing would replace that error by a BufferError. It goes with the last view.
    whole = memoryview(mmap.mmap(descriptor, length, prot=mmap.PROT_READ))
    yield {name: whole[place] for name, place in places.items()}
