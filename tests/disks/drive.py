"""A drive with a volatile write cache, whose power can be cut and which can fail.

    program ─► ext4 or xfs ─► block layer ─► loop device ─► the file "disk" on FUSE ─► this drive

The file system, its journal and the block layer are the running kernel's own; only the drive is
simulated. It behaves as a disk does that says it has a write cache:

- A write goes to the cache. It is read back from there, and may reach the medium at any time.
- A flush brings all of the cache to the medium. (Forced writes arrive as a write and a flush.)
- At a cut each cached sector is on the medium or not, whatever the order in which they were
  written; of a sector that was written several times, any version may be. Then nothing answers.

Needs root, /dev/fuse, a free loop device and the file system's mkfs. `Drive` is used by the tests;
the module run as a program is the drive itself.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

SECTOR: Final = 512
MKFS: Final = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}
#: The smallest that mkfs makes, with room for a few checkpoints.
SIZES: Final = {"ext4": 128 << 20, "xfs": 320 << 20}
OPTIONS: Final = {"ext4": "loop,commit=1", "xfs": "loop,nouuid"}

_BOUND_S: Final = 60
_MESSAGE: Final = 1 << 16
_WRITE_MAX: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1
_CLONE_NEWNS, _MS_PRIVATE, _MS_REC, _MS_NOSUID_NODEV, _MNT_DETACH = 0x20000, 1 << 18, 0x4000, 6, 2
_libc = ctypes.CDLL(None, use_errno=True)


class DriveError(Exception):
    """The drive can't be made here, or does not do what it should."""


def missing(file_system: str) -> str | None:
    """Why there can be no drive with this file system here; None: there can."""
    if os.geteuid() != 0:
        return "not root: nothing can be mounted"
    for path in ("/dev/fuse", "/dev/loop-control"):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            return f"{path}: {error.strerror}"
    if shutil.which(MKFS[file_system][0]) is None:
        return f"there is no {MKFS[file_system][0]}"
    return None


def private_mounts() -> None:
    """What this process mounts from now on is seen by it and its children only."""
    _call(_libc.unshare, _CLONE_NEWNS)
    _call(_libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise DriveError(f"{function.__name__}: {os.strerror(code)}")


# ------------------------------------------------------------------ the drive, from outside


class Drive:
    """A drive with a file system on it, mounted at `path / "files"`.

    Args:
        path: an empty directory for all that belongs to it.
        file_system: "ext4" or "xfs".

    Raises:
        DriveError: it can't be made here.
    """

    def __init__(self, path: Path, file_system: str) -> None:
        self._path, self._file_system = path, file_system
        self.files = path / "files"
        self._fuse = path / "fuse"
        self._medium = path / "medium"
        for directory in (self.files, self._fuse):
            directory.mkdir()
        with self._medium.open("wb") as medium:
            medium.truncate(SIZES[file_system])
        self._run(*MKFS[file_system], str(self._medium))
        self._is_on = False
        self.on()

    def on(self) -> None:
        """Power: what is on the medium is mounted; the file system recovers by its own means."""
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_BOUND_S)
        options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        try:
            source, kind = b"drive", b"fuse.drive"
            _call(_libc.mount, source, bytes(self._fuse), kind, _MS_NOSUID_NODEV, options)
            self._server = subprocess.Popen(
                [sys.executable, __file__]
                + [str(word) for word in (self._medium, self._fuse, fuse, control.fileno())],
                pass_fds=(fuse, control.fileno()),
                start_new_session=True,
            )
        finally:
            os.close(fuse)
            control.close()
        self._is_on = True
        self._run(
            *("mount", "-t", self._file_system, "-o", OPTIONS[self._file_system]),
            *(str(self._fuse / "disk"), str(self.files)),
        )

    def off(self) -> None:
        """Unmount everything, whether the drive still answers or not."""
        if not self._is_on:
            return
        # umount(8) would look at the path first, which answers EIO when the power was cut.
        for path in (self.files, self._fuse):
            until_s = time.monotonic() + _BOUND_S / 20
            while _libc.umount2(bytes(path), 0) != 0 and ctypes.get_errno() == errno.EBUSY:
                if time.monotonic() > until_s:
                    _libc.umount2(bytes(path), _MNT_DETACH)
                    break
                time.sleep(0.01)
        self._control.close()
        try:
            self._server.wait(_BOUND_S / 6)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._is_on = False

    def cut(self, seed: int, *, at: int = 0) -> dict[str, int]:
        """Cut the power: now, or at the `at`-th write or flush from now.

        Returns:
            How many writes and flushes there were, and how many sectors were in the cache and were
            kept; `dead` says whether it was cut by now.
        """
        return self._ask(do="cut", seed=seed, at=at)

    def seen(self) -> dict[str, int]:
        """The same figures, and nothing happens."""
        return self._ask(do="look")

    def fail(self, *what: str) -> None:
        """From now on "read", "write" or "flush" answer EIO; nothing: it is mended."""
        self._ask(do="fail", what=what)

    def hang(self) -> None:
        """From now on nothing is answered, until it is mended."""
        self._ask(do="hang")

    def mend(self) -> None:
        """What was asked meanwhile is answered now."""
        self._ask(do="mend")

    def _ask(self, **question: Any) -> dict[str, int]:
        self._control.send(json.dumps(question).encode())
        answer: dict[str, int] = json.loads(self._control.recv(_MESSAGE))
        return answer

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BOUND_S, check=False
        )
        if done.returncode != 0:
            raise DriveError(f"{' '.join(command)}: {done.stderr.strip()}")


# ------------------------------------------------------------------ the drive, from inside


class Cells:
    """The medium and the cache before it."""

    def __init__(self, path: str) -> None:
        self._medium = os.open(path, os.O_RDWR)
        self.length = os.fstat(self._medium).st_size
        self._cache: dict[int, list[bytes]] = {}  # each cached sector's versions, oldest first
        self.figures = {"writes": 0, "flushes": 0, "cached": 0, "kept": 0, "dead": 0}
        self.failing: set[str] = set()
        self.hangs = False
        self._armed: tuple[int, int] | None = None

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray(os.pread(self._medium, length, offset))
        if self._cache:
            for at in range(0, length, SECTOR):
                versions = self._cache.get((offset + at) // SECTOR)
                if versions is not None:
                    found[at : at + SECTOR] = versions[-1]
        return bytes(found[:length])

    def write(self, offset: int, content: bytes) -> None:
        assert offset % SECTOR == len(content) % SECTOR == 0, "a block device writes sectors"
        for at in range(0, len(content), SECTOR):
            sector = content[at : at + SECTOR]
            self._cache.setdefault((offset + at) // SECTOR, []).append(sector)
        self.figures["writes"] += 1
        self._tick()

    def flush(self) -> None:
        for number, versions in self._cache.items():
            os.pwrite(self._medium, versions[-1], number * SECTOR)
        self._cache.clear()
        self.figures["flushes"] += 1
        self._tick()

    def arm(self, seed: int, at: int) -> None:
        """Cut at the `at`-th write or flush from now; at 0: now."""
        self._armed = (seed, self._done() + at)
        if at == 0:
            self._tick()

    def _done(self) -> int:
        return self.figures["writes"] + self.figures["flushes"]

    def _tick(self) -> None:
        if self.figures["dead"] or self._armed is None or self._done() < self._armed[1]:
            return
        chance = random.Random(self._armed[0])
        likely = chance.random()  # for this cut: from nearly nothing to nearly all is kept
        for number, versions in self._cache.items():
            self.figures["cached"] += 1
            if chance.random() < likely:
                os.pwrite(self._medium, chance.choice(versions), number * SECTOR)
                self.figures["kept"] += 1
        self._cache.clear()
        self.figures["dead"] = 1


# The parts of the FUSE protocol (linux/fuse.h) that a loop device on one file needs.
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE = 1, 2, 3, 4, 14, 15, 16
STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR, RELEASEDIR = 17, 18, 20, 25, 26, 27, 29
ACCESS, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 34, 36, 38, 42, 43
_NO_ANSWER: Final = (FORGET, BATCH_FORGET, INTERRUPT)
_NOTHING_TO_DO: Final = (FLUSH, RELEASE, RELEASEDIR, ACCESS, DESTROY)
_ROOT, _DISK, _FOR_EVER_S = 1, 2, 3600
_HEADER: Final = struct.Struct("<IIQQ")
_HEADER_BYTES: Final = 40
_ASYNC_READ, _BIG_WRITES, _MAX_PAGES = 1 << 0, 1 << 5, 1 << 22


class Failed(Exception):  # noqa: N818  # an answer, not an error of this program
    """The request is answered with this errno."""


class Server:
    """Shows the cells as one file."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    def answer(self, operation: int, node: int, body: bytes) -> bytes:
        if operation in _NOTHING_TO_DO:
            return b""
        if operation == INIT:
            major, minor, ahead, _ = struct.unpack_from("<4I", body)
            flags = _ASYNC_READ | _BIG_WRITES | _MAX_PAGES
            pages = _WRITE_MAX // os.sysconf("SC_PAGE_SIZE")
            sizes = (64, 48, _WRITE_MAX, 1, pages, 0)  # queue lengths, writes, time, pages
            return struct.pack(
                "<4I2H2I2H8I", major, min(minor, 31), ahead, flags, *sizes, *(0,) * 8
            )
        if operation == LOOKUP:
            if body.rstrip(b"\0") != b"disk":
                raise Failed(errno.ENOENT)
            return struct.pack("<4Q2I", _DISK, 0, _FOR_EVER_S, _FOR_EVER_S, 0, 0) + self._about(
                _DISK
            )
        if operation in (GETATTR, SETATTR):
            return struct.pack("<Q2I", _FOR_EVER_S, 0, 0) + self._about(node)
        if operation in (OPEN, OPENDIR):
            return struct.pack("<Q2I", 0, 0, 0)
        if operation == STATFS:
            sectors = self._cells.length // 4096
            return struct.pack("<5Q4I6I", sectors, 0, 0, 2, 0, 4096, 255, 4096, *(0,) * 7)
        if operation in (READ, WRITE, FSYNC):
            return self._of_the_disk(operation, body)
        # fallocate: then the loop device offers no discard.
        raise Failed(errno.EOPNOTSUPP if operation == FALLOCATE else errno.ENOSYS)

    def _of_the_disk(self, operation: int, body: bytes) -> bytes:
        name = {READ: "read", WRITE: "write", FSYNC: "flush"}[operation]
        if self._cells.figures["dead"] or name in self._cells.failing:
            raise Failed(errno.EIO)
        if operation == FSYNC:
            self._cells.flush()
            return b""
        offset, length = struct.unpack_from("<QI", body, 8)
        if operation == READ:
            return self._cells.read(offset, length)
        self._cells.write(offset, body[40 : 40 + length])
        return struct.pack("<2I", length, 0)

    def _about(self, node: int) -> bytes:
        mode, length = (0o40755, 4096) if node == _ROOT else (0o100600, self._cells.length)
        sizes, times = (length, length // 512), (0,) * 6
        return struct.pack("<6Q10I", node, *sizes, *times, mode, 1, 0, 0, 0, 4096, 0)


def serve(medium: str, fuse: int, control: socket.socket) -> None:
    """Answer until the file is unmounted."""
    cells = Cells(medium)
    server = Server(cells)
    while True:
        for ready in select.select([control] if cells.hangs else [fuse, control], [], [])[0]:
            if ready is control:
                _obey(cells, control)
            elif not _answer_one(server, fuse):
                return


def _obey(cells: Cells, control: socket.socket) -> None:
    asked = json.loads(control.recv(_MESSAGE) or '{"do": "end"}')
    if asked["do"] == "end":  # nobody is left who asks
        os._exit(0)
    if asked["do"] == "cut":
        cells.arm(asked["seed"], asked["at"])
    elif asked["do"] == "fail":
        cells.failing = set(asked["what"])
    elif asked["do"] in ("hang", "mend"):
        cells.hangs = asked["do"] == "hang"
    control.send(json.dumps(cells.figures).encode())


def _answer_one(server: Server, fuse: int) -> bool:
    """Answer one request; False when there will be no more."""
    try:
        request = os.read(fuse, _WRITE_MAX + 4096)
    except OSError as error:
        return error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT)
    _, operation, unique, node = _HEADER.unpack_from(request)
    if operation in _NO_ANSWER:
        return True
    code, content = 0, b""
    try:
        content = server.answer(operation, node, request[_HEADER_BYTES:])
    except Failed as answer:
        code = -answer.args[0]
    try:
        os.write(fuse, struct.pack("<IiQ", 16 + len(content), code, unique) + content)
    except FileNotFoundError:
        return True  # whoever asked was interrupted meanwhile
    return operation != DESTROY


if __name__ == "__main__":
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not in the namespace of the mounts: a process that ends unmounts what it is the last to see,
    # and would wait for its own answers.
    private_mounts()
    _call(_libc.umount2, sys.argv[2].encode(), _MNT_DETACH)
    serve(sys.argv[1], int(sys.argv[3]), socket.socket(fileno=int(sys.argv[4])))
