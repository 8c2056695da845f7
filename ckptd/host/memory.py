"""Memory shared between processes: memfds, which have no name and vanish with their user.

A container's /dev/shm may be small, and Python's resource tracker unlinks named segments when one
of their users dies; a memfd knows neither.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_SPARE: Final = 64 << 20  # left to everybody else; what is free is never known to the last byte


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
    """Bytes that this process may still use: of the machine's, and of its control groups' limits.

    Files that are only cached count as free: the kernel drops them when memory is asked for. In a
    group with a limit they fill all of it after a while, whatever the job needs.
    """
    left = [limit - used for limit, used in _limits()]
    return min([psutil.virtual_memory().available, *(max(0, one) for one in left)])


def is_short(length: int) -> bool:
    """Whether there is not room for so many bytes more."""
    return available() < length + _SPARE


def reserved(directory: Path, length: int) -> int:
    """A file without a name of so many bytes: writing into its mapping can't fail any more.

    Raises:
        OSError: the disk has no room for it.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, length)
        return os.dup(file.fileno())


@dataclass(frozen=True)
class _Version:
    """What a version of control groups calls its files."""

    root: Path
    limit: str
    used: str
    cached: tuple[str, str]
    events: str


_VERSION_1: Final = _Version(
    Path("/sys/fs/cgroup/memory"),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "memory.oom_control",
)
_VERSION_2: Final = _Version(
    Path("/sys/fs/cgroup"),
    "memory.max",
    "memory.current",
    ("inactive_file", "active_file"),
    "memory.events",
)


def _groups() -> Iterator[tuple[Path, _Version]]:
    """The control group of this process that accounts for its memory, in each version."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield _VERSION_2.root / path.lstrip("/"), _VERSION_2
            elif "memory" in controllers.split(","):
                yield _VERSION_1.root / path.lstrip("/"), _VERSION_1


def _limits() -> Iterator[tuple[int, int]]:
    """The limit of each group above this process that has one, and what it uses of it."""
    for own, version in _groups():
        for group in (own, *own.parents):
            limit = _limit_of(group, version)
            if limit is not None:
                with suppress(OSError, ValueError):  # it was removed meanwhile
                    yield limit, _used(group, version)
            if group == version.root:
                break


def _used(group: Path, version: _Version) -> int:
    used = int((group / version.used).read_text(encoding="ascii"))
    for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name in version.cached:
            used -= int(value)
    return used


def _limit_of(group: Path, version: _Version) -> int | None:
    with suppress(OSError, ValueError):  # no such group in this container, or "max"
        limit = int((group / version.limit).read_text(encoding="ascii"))
        if limit < psutil.virtual_memory().total:
            return limit
    return None


#: How a command ends that SIGKILL ended, or whose shell says so.
_KILLED: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)


class OomWatch:
    """Whether the kernel has killed processes for want of memory since this was made."""

    def __init__(self) -> None:
        self._before = _oom_kills()

    def found(self, code: int) -> str | None:
        """What to say of it; None: that is not why it ended.

        Args:
            code: with which a job ended: its exit status, or minus a signal.
        """
        now = _oom_kills()
        killed = {name for name, kills in now.items() if kills > self._before.get(name, kills)}
        for group, version in _groups():
            if str(group) in killed:
                limit = _limit_of(group, version)
                of = "" if limit is None else f", which may use {limit >> 20} MiB"
                return f"out of memory: the kernel killed a process of its control group{of}"
        if killed and code in _KILLED:
            # Maybe another's: only the whole machine is counted here.
            return "maybe out of memory: the kernel killed a process on this machine meanwhile"
        return None


def _oom_kills() -> dict[str, int]:
    """Processes killed so far, by control group of this process; "": on the whole machine."""
    files = {"": Path("/proc/vmstat")}
    files |= {str(group): group / version.events for group, version in _groups()}
    kills = {}
    for name, file in files.items():
        with suppress(OSError):  # a container that does not show its control group
            for line in file.read_text(encoding="ascii").splitlines():
                if line.startswith("oom_kill "):
                    kills[name] = int(line.split()[1])
    return kills


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


def readable(descriptor: int) -> memoryview:
    """A memfd's bytes, read-only; lives as long as it is used."""
    length = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, length, prot=mmap.PROT_READ) if length else b"")


@contextmanager
def pieces(
    memories: Iterable[tuple[int, Mapping[str, slice]]],
) -> Iterator[dict[str, memoryview]]:
    """Named pieces of the bytes of some memfds, read-only, while the context lasts.

    Args:
        memories: each one's descriptor, and where in it the pieces are; all names differ.
    """
    # The mappings are not closed here: after an error the frames of whoever raised it still look
    # into them, and closing would replace that error by a BufferError. They go with the last view.
    found = {}
    for descriptor, places in memories:
        whole = readable(descriptor)
        found.update({name: whole[place] for name, place in places.items()})
    yield found
