"""The file operations that the store needs; each can fail, and each can be the last.

Rules:

1. An operation does one thing. What must survive a power cut is synced by a call of its own, so
   that the order of writes and syncs is the store's, to be read there and to be enumerated by the
   tests.
2. Nothing here follows a symbolic link in the last part of a path, and only regular files are read.
3. Errors are plain `OSError`s that name the path; the store says what they mean for the user.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
from pathlib import Path
from typing import Final, Protocol

#: What a file's content may be given as, and read as.
Content = bytes | bytearray | memoryview | mmap.mmap

_MADV_POPULATE_READ: Final = 22  # linux/mman.h; Python has no name for it


class Disk(Protocol):
    """A file system, real or simulated."""

    def make_directory(self, path: Path) -> None:
        """Create a directory whose parent exists; FileExistsError when it is there."""

    def write(self, path: Path, content: Content) -> None:
        """Create a file that is not there yet and write all of its content. Not synced."""

    def sync(self, path: Path) -> None:
        """Make a file's content durable."""

    def sync_directory(self, path: Path) -> None:
        """Make a directory's entries durable."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename within a file system; never replaces a directory that has something in it."""

    def remove(self, path: Path) -> None:
        """Remove a file."""

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and everything in it."""

    def names(self, path: Path) -> list[str]:
        """The names in a directory, sorted; none when there is no such directory."""

    def size(self, path: Path) -> int:
        """The length of a regular file in bytes."""

    def read(self, path: Path) -> Content:
        """The content of a regular file; a mapping of it where that is cheaper."""


class RealDisk:
    """The operating system's file system; see `Disk` for what each operation does."""

    def make_directory(self, path: Path) -> None:
        path.mkdir()

    def write(self, path: Path, content: Content) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
        try:
            with memoryview(content) as whole:
                rest = whole.cast("B")
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                rest.release()
        except OSError as error:
            raise _named(error, path) from error
        finally:
            os.close(descriptor)

    def sync(self, path: Path) -> None:
        _sync(path, os.O_RDONLY | os.O_NOFOLLOW)

    def sync_directory(self, path: Path) -> None:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def names(self, path: Path) -> list[str]:
        try:
            return sorted(entry.name for entry in path.iterdir())
        except FileNotFoundError:
            return []

    def size(self, path: Path) -> int:
        return _regular(path, os.lstat(path)).st_size

    def read(self, path: Path) -> Content:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            length = _regular(path, os.fstat(descriptor)).st_size
            if length == 0:
                return b""
            mapping = mmap.mmap(descriptor, length, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        _read_all(mapping, path)
        return mapping


def _read_all(mapping: mmap.mmap, path: Path) -> None:
    """Bring a mapped file into memory, so that a disk that fails is an error and not a SIGBUS."""
    try:
        mapping.madvise(_MADV_POPULATE_READ)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return  # a kernel before 5.14: it is read when it is looked at
        if error.errno == errno.EFAULT:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
        raise _named(error, path) from error


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        os.close(descriptor)


def _named(error: OSError, path: Path) -> OSError:
    """What failed on a descriptor, with the path that was meant."""
    return OSError(error.errno, error.strerror, str(path))


def _regular(path: Path, found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found
