"""Threads that write to whoever reads us: a reader that is slow, stuck or gone stops nobody.

`| less`, Ctrl-S, and a batch job's output file on a network file system that does not answer block
a write for as long as they like. Meanwhile the supervisor has to hear signals and to save the job.

Rules:

1. Bytes leave in the order in which they came, unchanged, as soon as the reader takes them.
2. What waits is bounded. What does not fit is dropped, never waited for: a job must not stand
   still, and its log has everything.
3. Streams that lead to the same place share a thread, so that the order between them is kept.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable
from typing import Final

#: Of one stream.
WAITING_BYTES_MAX: Final = 64 << 20


class Hand:
    """A thread that does one thing after the other; it begins with the first one."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._begun = False
        self._lock = threading.Lock()

    def do(self, task: Callable[[], object]) -> None:
        """Do something after all that was asked before."""
        with self._lock:
            if not self._begun:
                self._begun = True
                threading.Thread(target=self._work, name="outlet", daemon=True).start()
            self._tasks.put(task)

    def drain(self, bound_s: float) -> bool:
        """Wait until all is done; False: it was not, after so long."""
        if not self._begun:
            return True
        done = threading.Event()
        self.do(done.set)
        return done.wait(max(0.0, bound_s))

    def _work(self) -> None:
        while True:
            self._tasks.get()()


class Outlet:
    """One stream.

    Args:
        descriptor: of its file.
        hand: writes.
        failed: told of each piece that could not be written; called in the thread.
    """

    def __init__(self, descriptor: int, hand: Hand, failed: Callable[[OSError], object]) -> None:
        self._descriptor, self._hand, self._failed = descriptor, hand, failed
        self._lock = threading.Lock()
        self._waiting = 0
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Bytes that are not written yet."""
        return self._waiting

    def put(self, chunk: bytes) -> bool:
        """Write that as soon as possible; False: too much waits already, it is dropped."""
        with self._lock:
            if self._waiting + len(chunk) > WAITING_BYTES_MAX:
                self.dropped += len(chunk)
                return False
            self._waiting += len(chunk)
        self._hand.do(lambda: self._write(chunk))
        return True

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # whoever shares the terminal made it so
                    waiting = select.poll()  # select knows no descriptor above 1023
                    waiting.register(self._descriptor, select.POLLOUT)
                    waiting.poll()
        except OSError as error:
            self._failed(error)
        finally:
            with self._lock:
                self._waiting -= len(chunk)


def same_place(one: int, other: int) -> bool:
    """Whether two descriptors lead to the same file, terminal or pipe."""
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False  # one of them is closed
