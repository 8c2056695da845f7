"""The file operations that the store needs; each can fail, and each can be the last.

Rules:

1. An operation does one thing. What must survive a power cut is synced by a call of its own, so
   that the order of writes and syncs is the store's, to be read there and to be enumerated by the
   tests.
2. Nothing here follows a symbolic link in the last part of a path, and only regular files are read.
3. Errors are plain `OSError`s that name the path; the store says what they mean for the user.
4. Large content goes past the page cache (O_DIRECT), from several threads: that is as fast as the
   disk is, and pushes nothing of the training's data out of memory. Where a file system refuses it,
   or the memory is not aligned, the same bytes are written the usual way.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import psutil

#: What a file's content may be given as, and read as.
Content = bytes | bytearray | memoryview | mmap.mmap

_MADV_POPULATE_READ: Final = 22  # linux/mman.h; Python has no name for it


_DIRECT_FROM: Final = 1 << 20
_BLOCK: Final = 4096
_CHUNK: Final = 16 << 20
_READ: Final = 4 << 20
_PIECE: Final = 1 << 20
_THREADS: Final = 4
_LOCAL: Final = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
#: What a file system says that takes no direct writes, or not from this memory.
_NO_DIRECT: Final = {errno.EINVAL, errno.EOPNOTSUPP}  # the latter is ENOTSUP too
_NO_LINKS: Final = {errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP}


class Disk(Protocol):
    """A file system, real or simulated."""

    def make_directory(self, path: Path) -> None:
        """Create a directory whose parent exists; FileExistsError when it is there."""

    def write(self, path: Path, content: Content) -> None:
        """Create a file that is not there yet and write all of its content. Not synced."""

    def link(self, source: Path, target: Path) -> bool:
        """Give a file a second name that is not there yet; False: this file system can't."""

    def sync(self, path: Path) -> None:
        """Make a file's content durable."""

    def sync_directory(self, path: Path) -> None:
        """Make a directory's entries durable."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename within a file system; never replaces a directory that has something in it."""

    def remove(self, path: Path) -> None:
        """Remove a file."""

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and everything in it; what is no directory is removed itself."""

    def names(self, path: Path) -> list[str]:
        """The names in a directory, sorted; none when there is no such directory."""

    def size(self, path: Path) -> int:
        """The length of a regular file in bytes."""

    def identity(self, path: Path) -> object:
        """What two names of one file have in common, and no other file has."""

    def read(self, path: Path) -> Content:
        """The content of a regular file; a mapping of it where that is cheaper."""

    def stream(self, path: Path) -> Iterator[memoryview]:
        """The content of a regular file from its begin to its end, in little memory.

        A piece is to be used before the next one is asked for.
        """

    def pieces(self, path: Path, places: Iterable[int], length: int) -> list[bytes]:
        """At most `length` bytes from each of some places of a regular file, and no more of it."""


class RealDisk:
    """The operating system's file system; see `Disk` for what each operation does."""

    def make_directory(self, path: Path) -> None:
        path.mkdir()

    def write(self, path: Path, content: Content, mode: int = 0o644) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, mode)
        try:
            with memoryview(content) as whole, whole.cast("B") as view:
                done = _write_direct(path, view) if len(view) >= _DIRECT_FROM else 0
                _write_all(descriptor, view, done, len(view))
        except OSError as error:
            raise _named(error, path) from error
        finally:
            os.close(descriptor)

    def link(self, source: Path, target: Path) -> bool:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        return True

    def sync(self, path: Path) -> None:
        _sync(path, os.O_RDONLY | os.O_NOFOLLOW)

    def sync_directory(self, path: Path) -> None:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()

    def names(self, path: Path) -> list[str]:
        try:
            return sorted(entry.name for entry in path.iterdir())
        except FileNotFoundError:
            return []

    def size(self, path: Path) -> int:
        return _regular(path, os.lstat(path)).st_size

    def identity(self, path: Path) -> object:
        found = os.lstat(path)
        return found.st_dev, found.st_ino

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

    def stream(self, path: Path) -> Iterator[memoryview]:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield from _streamed(descriptor, _regular(path, os.fstat(descriptor)).st_size)
        except OSError as error:
            raise _named(error, path) from error
        finally:
            os.close(descriptor)

    def pieces(self, path: Path, places: Iterable[int], length: int) -> list[bytes]:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _regular(path, os.fstat(descriptor))
            return [os.pread(descriptor, length, at) for at in places]
        finally:
            os.close(descriptor)


def free(path: Path) -> int:
    """Bytes that may still be written where a directory is."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def local_kind(path: Path) -> str | None:
    """A directory's file system, if it is of a kind that other machines don't see as a rule."""
    above = {path.resolve(), *path.resolve().parents}
    mounts = [one for one in psutil.disk_partitions(all=True) if Path(one.mountpoint) in above]
    kind = max(mounts, key=lambda one: len(one.mountpoint)).fstype
    return kind if kind in _LOCAL else None


def _read_all(mapping: mmap.mmap, path: Path) -> None:
    # It is read from begin to end: the disk is then asked for much at once, and ahead.
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    try:
        for at in range(0, len(mapping), _READ):  # other threads get their turn in between
            if not _populated(mapping, at):
                return  # it is read when it is looked at
    except OSError as error:
        raise _named(error, path) from error


def _populated(mapping: mmap.mmap, at: int) -> bool:
    """Bring some of a mapped file into memory, so that a disk that fails is no SIGBUS.

    False: this kernel can't (before 5.14).
    """
    try:
        mapping.madvise(_MADV_POPULATE_READ, at, min(_READ, len(mapping) - at))
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _streamed(descriptor: int, length: int) -> Iterator[memoryview]:
    if length == 0:
        return
    # Where the system caches files in large pages, a mapping saves a third of the time.
    with mmap.mmap(descriptor, length, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as all_:
        mapping.madvise(mmap.MADV_SEQUENTIAL)
        for at in range(0, length, _READ):
            if not _populated(mapping, at):
                break
            with all_[at : at + _READ] as piece:
                yield piece
            mapping.madvise(mmap.MADV_DONTNEED, at, min(_READ, length - at))
        else:
            return
    yield from _copied(descriptor, at)


def _copied(descriptor: int, at: int) -> Iterator[memoryview]:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    with memoryview(bytearray(_PIECE)) as buffer:
        while count := os.preadv(descriptor, [buffer], at):
            yield buffer[:count]
            at += count


def _write_direct(path: Path, view: memoryview) -> int:
    """Write all whole blocks past the page cache; the number of bytes written, 0: refused."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return 0
        raise
    end = len(view) - len(view) % _BLOCK
    chunks = [(at, min(at + _CHUNK, end)) for at in range(0, end, _CHUNK)]
    try:
        # The first tells whether the memory is aligned as this file system wants it.
        _write_all(descriptor, view, *chunks[0])
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda chunk: _write_all(descriptor, view, *chunk), chunks[1:]):
                pass
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return 0
        raise
    finally:
        os.close(descriptor)
    return end


def _write_all(descriptor: int, view: memoryview, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(descriptor, view[start:end], start)


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
