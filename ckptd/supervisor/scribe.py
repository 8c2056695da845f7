"""The thread that writes the journal and the log, so that a disk that hangs stops nobody.

A network file system may not answer for minutes. The supervisor then still has to hear signals, and
the training must not wait for a pipe that nobody reads. What is to be written waits here, in order;
of the job's output at most WAITING_BYTES_MAX, and it is said when more had to be dropped.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

from ckptd.supervisor.journal import Journal

WAITING_BYTES_MAX: Final = 64 << 20


class Scribe:
    """Writes a run's journal and log.

    Args:
        journal: the journal.
        log: the log's path.
        say_once: tells a person; called from the thread too.
    """

    def __init__(self, journal: Journal, log: Path, say_once: Callable[[str], None]) -> None:
        self._journal, self._log, self._say_once = journal, log, say_once
        self._tasks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._waiting = 0
        self._begun = False
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="scribe", daemon=True).start()

    def event(self, event: str, **fields: Any) -> None:
        """Write an event into the journal; it happened now."""
        line = self._journal.line(event, fields)
        self._tasks.put(lambda: self._journal.append(line))

    def output(self, chunk: bytes) -> None:
        """Write a piece of the job's output into the log."""
        with self._lock:
            if self._waiting + len(chunk) > WAITING_BYTES_MAX:
                self._say_once(f"{self._log} could not be written for long: a part will be missing")
                return
            self._waiting += len(chunk)
        self._tasks.put(lambda: self._write(chunk))

    def do(self, task: Callable[[], object]) -> None:
        """Do something else that touches the disk, after all that was asked before."""
        self._tasks.put(task)

    def drain(self, bound_s: float) -> bool:
        """Wait until all is written; False: the disk did not answer for so long."""
        done = threading.Event()
        self._tasks.put(done.set)
        return done.wait(bound_s)

    def _work(self) -> None:
        while True:
            self._tasks.get()()

    def _write(self, chunk: bytes) -> None:
        try:
            with self._log.open("ab+", buffering=0) as log:
                if not self._begun and _within_a_line(log):
                    log.write(b"\n")  # an earlier supervisor was killed in the middle of it
                self._begun = True
                log.write(chunk)
        except OSError as error:
            self._say_once(f"the log {self._log} can't be written: {error.strerror}")
        finally:
            with self._lock:
                self._waiting -= len(chunk)


def _within_a_line(log: BinaryIO) -> bool:
    """Whether a file does not end with a line's end."""
    if log.seek(0, os.SEEK_END) == 0:
        return False
    log.seek(-1, os.SEEK_END)
    return log.read(1) != b"\n"
