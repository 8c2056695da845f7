"""Memory for snapshots, used again: filling pages that exist costs one copy, fresh ones several.

A snapshot lies in a memfd that the supervisor holds too. Rules:

1. A memory that the supervisor may still read is never written to. It says when it has let go
   (`wire.Released`); until then the next snapshot goes into another memory. So one whole snapshot
   is there at any instant, also when this process is killed while it fills the next one.
2. At most two memories are kept. A third, when both are in the supervisor's hands, is for one use.
3. A memory is kept only where as much is free beside it.
4. Where there is not enough for another one, the supervisor is asked to give back what is durable.
   If that does not do, the snapshot goes through a file on the disk, which the kernel may write out
   and drop from memory as it needs to: slower, and nobody is killed for want of memory.
5. A process that is forked (a loader's worker) has no part in it: nothing that it does to its own
   memory, right or wrong, can reach a snapshot.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ckptd.host import memory

_KEPT_MAX: Final = 2
_GIVEN_BACK_WITHIN_S: Final = 2.0
_POLL_S: Final = 0.05
_PROT_NONE: Final = 0
_FIXED_NOREPLACE: Final = 0x100000  # MAP_FIXED_NOREPLACE: there, or an error

_mmap: Final = ctypes.CDLL(None).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]


class Arena:
    """One memory: a memfd and its mapping.

    Args:
        length: in bytes.
        directory: of a file without a name, to take instead of a memfd.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, length: int, directory: Path | None = None) -> None:
        self.spilled = directory is not None
        if directory is None:
            self.descriptor = memory.make("ckptd-snapshot", length)
        else:
            self.descriptor = memory.reserved(directory, length)
        self.length = length
        self.mapping = mmap.mmap(self.descriptor, length)
        self.mapping.madvise(mmap.MADV_DONTFORK)
        _open.add(self)
        # The address stays as long as the mapping; the view that gave it must not, or it could
        # never be closed.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.holders = 0
        self.unpin: Callable[[], object] | None = None  # of who pinned it for a GPU

    def close(self) -> None:
        """Let go of it; who else holds the descriptor keeps its own."""
        _open.discard(self)
        if self.unpin is not None:
            self.unpin()
        self.mapping.close()
        os.close(self.descriptor)


_open: Final[weakref.WeakSet[Arena]] = weakref.WeakSet()


def _keep_places_free() -> None:
    """In a forked child: no memory of its own comes to lie where an arena was.

    The child's copy of the mapping object knows nothing of its mapping's absence. When it goes, so
    does whatever lies at that address.
    """
    for arena in list(_open):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED_NOREPLACE
        _mmap(arena.address, arena.length, _PROT_NONE, flags, -1, 0)


os.register_at_fork(after_in_child=_keep_places_free)


class Arenas:
    """The memories of one process."""

    def __init__(self) -> None:
        self._kept: list[Arena] = []
        self._sent: dict[int, Arena] = {}
        self._lock = threading.Condition()  # releases come in the link's thread
        self._asked = False
        #: Called with the bytes that are needed, and those that are free, when these are too few.
        self.on_short: Callable[[int, int], object] | None = None
        #: Where a snapshot lies for which there is no memory; None: in memory all the same.
        self.directory: Path | None = None
        #: Called when one lies there, or could not.
        self.on_spilled: Callable[[OSError | None], object] = lambda _: None

    def take(self, length: int) -> Arena:
        """A memory of at least so many bytes that nobody reads; it is the caller's."""
        with self._lock:
            arena = self._fitting(length)
            if arena is None and self.on_short is not None and memory.is_short(length):
                self._ask_back(length)
                arena = self._fitting(length)
            if arena is None:
                for outgrown in [one for one in self._kept if one.holders == 0]:
                    self._kept.remove(outgrown)
                    outgrown.close()
                arena = self._made(length)
                self._kept.append(arena)
            arena.holders += 1
            return arena

    def _made(self, length: int) -> Arena:
        if self.directory is None or not memory.is_short(length):
            return Arena(length)
        try:
            arena, refused = Arena(length, self.directory), None
        except OSError as error:
            arena, refused = Arena(length), error
        self.on_spilled(refused)
        return arena

    def _fitting(self, length: int) -> Arena | None:
        free = [one for one in self._kept if one.holders == 0 and one.length >= length]
        return min(free, key=lambda one: one.length, default=None)

    def _ask_back(self, length: int) -> None:
        assert self.on_short is not None, "checked by who calls"
        self.on_short(length, memory.available())
        if self._asked and not self._sent:
            return  # the supervisor has nothing of ours, nor of the process before this one
        self._asked = True
        until_s = time.monotonic() + _GIVEN_BACK_WITHIN_S
        while self._fitting(length) is None and memory.is_short(length):
            # It may come as one of ours, or, from the process before this one, as free memory.
            if not self._lock.wait(_POLL_S) and time.monotonic() > until_s:
                return  # it is being written, or there was none: try without

    def sent(self, generation: int, arena: Arena) -> None:
        """The supervisor holds it too, as this snapshot."""
        with self._lock:
            self._sent[generation] = arena
            arena.holders += 1

    def released(self, generation: int) -> None:
        """The supervisor has let go of this snapshot."""
        with self._lock:
            arena = self._sent.pop(generation, None)
        if arena is not None:
            self.let_go(arena)

    def let_go(self, arena: Arena) -> None:
        """One holder less."""
        with self._lock:
            arena.holders -= 1
            self._lock.notify_all()
            if arena.holders == 0 and not self._worth_keeping(arena):
                self._kept.remove(arena)
                arena.close()

    def _worth_keeping(self, arena: Arena) -> bool:
        if arena.spilled or len(self._kept) > _KEPT_MAX:
            return False
        return memory.available() >= arena.length
