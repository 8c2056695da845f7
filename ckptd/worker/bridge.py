"""A worker whose supervisor is on another machine: its messages, memories and page go over TCP.

Rules:

1. The link speaks into a Unix socket, as it does to a supervisor of this machine, also out of a
   signal handler. A thread at that socket's other end carries everything over; the training loop
   waits for no network, unless snapshots come faster than that carries them.
2. A snapshot's memory is in use until it is over there, and no longer: then the supervisor has it,
   and it is released here, whatever is done with it there.
3. Requests come as messages and are written into the page of this machine, which the loop reads as
   ever. The supervisor is told when a request stands there, and where the worker is after that.
4. What the page shows goes over about once a second.
"""

from __future__ import annotations

import mmap
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from ckptd import agree, wire
from ckptd.errors import ProtocolError
from ckptd.host import memory, sockets
from ckptd.host.streams import Kind, Parcel, Stream

#: Snapshots on their way: a network that is slower than they are made must not fill the memory.
_GOING_MAX: Final = 2
_PROGRESS_EVERY_S: Final = 1.0


class Bridge:
    """The thread between the link and the stream.

    Args:
        stream: to the supervisor; is taken over.

    Attributes:
        near: the link's end; packets come and go as from a supervisor of this machine.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._page_fd = memory.make("ckptd-status", wire.PAGE_BYTES)
        self._page = wire.StatusPage(memoryview(mmap.mmap(self._page_fd, wire.PAGE_BYTES)))
        self._told = self._page.progress()
        self._due_s = 0.0
        self._going: deque[tuple[Parcel, int]] = deque()  # with each, the snapshot's generation
        self._room = threading.Semaphore(_GOING_MAX)
        self._ends = False  # the link has said all
        self._over = False  # nothing goes over any more
        self._thread = threading.Thread(target=self._work, name="ckptd-bridge", daemon=True)
        # A forked loader worker that lives on must not keep a dead worker's connection open.
        os.register_at_fork(after_in_child=self._close_sockets)
        self._thread.start()

    def wait_for_room(self) -> None:
        """Before a snapshot is sent: wait until those before it are over there, all but one."""
        self._room.acquire()
        if self._over:
            self._room.release()  # nobody waits for what is over

    def finish(self) -> None:
        """Nothing more is said: wait until all is over there.

        A connection over which nothing moves any more ends by itself.
        """
        self.near.shutdown(socket.SHUT_WR)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._carry()
            self._stream.finish()
        except (OSError, ProtocolError):
            pass  # the supervisor can't be reached any more
        finally:
            # Not closed: the link may be writing, and must not write into another one's number.
            sockets.shut(self._far)  # the link sees the end
            self._stream.shut()
            self._going.clear()
            self._over = True
            self._room.release()

    def _carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream, selectors.EVENT_READ, self._from_supervisor)
            selector.register(self._far, selectors.EVENT_READ, self._from_link)
            while self._going or not self._ends:
                wait_s = 0.0 if self._going else max(0.0, self._due_s - time.monotonic())
                for key, _ in selector.select(wait_s):
                    key.data()
                if self._ends and len(selector.get_map()) > 1:
                    selector.unregister(self._far)
                self._show_progress()
                self._send_next()

    def _show_progress(self) -> None:
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _PROGRESS_EVERY_S
            now = self._page.progress()
            if now != self._told:
                self._stream.send(Kind.PAGE, now)
                self._told = now

    def _send_next(self) -> None:
        if not self._going:
            return
        parcel, generation = self._going[0]
        if parcel.send_next(self._stream):
            self._going.popleft()
            if generation:
                self._room.release()
                self._to_link(wire.Released(generation))

    def _from_link(self) -> None:
        packet, descriptors, _, _ = socket.recv_fds(self._far, wire.MESSAGE_BYTES_MAX, 1)
        self._due_s = 0.0  # what is said is said of what the page shows now
        if not packet:
            self._ends = True
            return
        message = wire.decode_for_supervisor(packet)
        if isinstance(message, wire.Snapshot) and descriptors:
            length = message.table.offset + message.table.length  # it is the last in the memory
            self._going.append((Parcel(packet, descriptors[0], length), message.generation))
        elif self._going and not isinstance(message, wire.Notice):
            self._going.append((Parcel(packet), 0))
        else:  # nothing is before it, or it can't wait
            self._stream.send(Kind.MESSAGE, packet)

    def _from_supervisor(self) -> None:
        came = self._stream.receive()
        if came is None:
            raise ConnectionError("the supervisor's end is closed")
        if came.kind not in (Kind.MESSAGE, Kind.CARRYING):
            return
        message = wire.decode_for_worker(came.payload)
        match message:
            case wire.Asked(word):
                self._page.words[wire.WORD_REQUEST] = word
                time.sleep(agree.SEEN_S)
                seen = wire.Seen(word, self._page.position())
                self._stream.send(Kind.MESSAGE, wire.encode(seen))
            case wire.Agreed(word, target):
                self._page.agree(word, target)
            case wire.Kill():
                os.kill(os.getpid(), signal.SIGKILL)
            case wire.Released():
                pass  # it was released here when it was over there
            case wire.Welcome():
                state = [] if came.descriptor is None else [came.descriptor]
                self._to_link(message, [self._page_fd, *state])
                for descriptor in (self._page_fd, *state):
                    os.close(descriptor)
            case _:
                self._to_link(message)

    def _to_link(self, message: wire.ToWorker, descriptors: Sequence[int] = ()) -> None:
        sockets.send(self._far, wire.encode(message), descriptors)

    def _close_sockets(self) -> None:
        self.near.close()
        self._far.close()
        self._stream.close()
