"""Signals as facts in a queue.

A handler enqueues the number and returns; what a signal means is decided elsewhere, in order.
Python's wakeup descriptor does the enqueueing: a byte for each signal, written by the C handler.
"""

from __future__ import annotations

import signal
import socket
from types import FrameType
from typing import Final

_WATCHED: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Signals:
    """The signals that mean something to a supervisor, from now until `close`.

    A SIGHUP that was ignored when we were started (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.settimeout(0)  # never waits
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watched = [
            number
            for number in _WATCHED
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN)
        ]
        for number in self._watched:
            signal.signal(number, _enqueued)

    def fileno(self) -> int:
        """Readable when a signal came."""
        return self._reader.fileno()

    def take(self) -> list[int]:
        """The numbers of the signals that came, in order."""
        try:
            return [number for number in self._reader.recv(4096) if number in self._watched]
        except BlockingIOError:
            return []

    def came(self, number: int) -> bool:
        """Whether this one is among those that `take` will give."""
        try:
            return number in self._reader.recv(4096, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Hear no more signals; those that still come are ignored.

        Slurm sends SIGTERM twice: the second one, between here and our last instruction, must not
        turn an exit code into a death by signal.
        """
        for number in self._watched:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()


def _enqueued(number: int, frame: FrameType | None) -> None:
    """Python wrote the number to the wakeup descriptor already."""
