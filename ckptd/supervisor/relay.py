"""Ranks on other machines, made to look as if they were here.

Rules:

1. For each rank elsewhere a thread stands between its TCP connection and the supervisor's own
   socket, and speaks there as a worker of this machine does: the loop knows one kind of worker.
   What a worker shares with it (a page, memories) the relay has here in the rank's place.
2. Nobody but the loop decides: a relay passes on, copies and gives up. If either connection ends,
   the other one does.
3. Strangers cost a bounded number of threads for a bounded time, whatever they do or leave undone,
   and hold up nobody: neither the loop nor the ranks that come after them.
4. The secret is drawn anew for each attempt: what is left of an earlier one is a stranger.
"""

from __future__ import annotations

import mmap
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from ckptd import wire
from ckptd.errors import CkptdError, ProtocolError
from ckptd.host import memory, sockets, streams
from ckptd.host.streams import Came, Kind, Parcel, Stream
from ckptd.supervisor.server import close_all

_SECRET_BYTES: Final = 32
_STRANGERS_MAX: Final = 64
#: A worker proves itself within milliseconds. Where all places are taken, who took longer goes.
_PATIENCE_S: Final = 2.0
_PAUSE_S: Final = 0.05
_GIVEN_BACK_WITHIN_S: Final = 2.0
_DESCRIPTORS_MAX: Final = 4


class Relays:
    """Listens for the ranks on other machines.

    Args:
        host: the name or address under which they find this one.
        port: 0: any.
        supervisor: the supervisor's own socket.
        directory: for memories for which there is no room.
        say: tells a person; called from threads.

    Raises:
        CkptdError: the port can't be had.
    """

    def __init__(
        self, host: str, port: int, supervisor: str, directory: Path, say: Callable[[str], None]
    ) -> None:
        try:
            self._listener = streams.listener(port)
        except OSError as error:
            raise CkptdError(f"can't listen on TCP port {port}: {error.strerror}") from error
        self._host, self._port = host, self._listener.getsockname()[1]
        self._supervisor, self._directory, self._say = supervisor, directory, say
        self._secret = secrets.token_bytes(_SECRET_BYTES)  # nobody's, before the first attempt
        self._relays: set[_Relay] = set()
        self._rooms = threading.Lock()
        self._lock = threading.Lock()
        self._strangers: dict[socket.socket, float] = {}  # since when each is here
        self._closed = False
        threading.Thread(target=self._listen, name="relays", daemon=True).start()

    def invite(self) -> wire.Invitation:
        """For the ranks of a new attempt; those of earlier ones are not let in any more."""
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        return wire.Invitation(self._host, self._port, self._secret)

    def close(self) -> None:
        """Let nobody in any more. The relays end with the supervisor's connections."""
        self._closed = True
        sockets.shut(self._listener)  # ends `accept`
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                time.sleep(_PAUSE_S)  # out of descriptors, say: the next time it may be better
                continue
            self._make_place()
            with self._lock:
                self._strangers[connection] = time.monotonic()
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _make_place(self) -> None:
        """Wait until one of the strangers has proved itself, or has had its time."""
        while True:
            with self._lock:
                if len(self._strangers) < _STRANGERS_MAX:
                    return
                oldest = next(iter(self._strangers))
                if time.monotonic() - self._strangers[oldest] > _PATIENCE_S:
                    del self._strangers[oldest]
                    sockets.shut(oldest)
                    return
            time.sleep(_PAUSE_S)

    def _meet(self, connection: socket.socket) -> None:
        """The thread of one connection, as long as it lasts."""
        try:
            connection.settimeout(streams.PROOF_S)
            streams.prove(connection, self._secret, worker=False)
        except (OSError, ProtocolError):
            connection.close()
            return
        finally:
            with self._lock:
                self._strangers.pop(connection, None)
        relay = _Relay(connection, self._supervisor, self._room)
        self._relays.add(relay)
        try:
            relay.run()
        except (OSError, ProtocolError) as error:
            self._say(f"a rank on another machine can't be heard any more: {error}")
        finally:
            self._relays.discard(relay)
            relay.close()

    def _room(self, length: int, relay: _Relay) -> int:
        """The memory for a snapshot that comes: here, or else on the disk.

        All ranks send theirs at once: what is on its way to the others counts as taken.
        """
        with self._rooms:
            short = self._is_short()
            if short:
                relay.ask_back(length)
                until_s = time.monotonic() + _GIVEN_BACK_WITHIN_S
                while (short := self._is_short()) and time.monotonic() < until_s:
                    time.sleep(_PAUSE_S)
            if short:
                with suppress(OSError):  # the disk has none either: what memory there is
                    return memory.reserved(self._directory, length)
            return memory.make("ckptd-came", length)

    def _is_short(self) -> bool:
        return memory.is_short(sum(relay.expected() for relay in tuple(self._relays)))


class _Relay:
    """One rank's.

    Args:
        connection: the rank's, proved.
        supervisor: the supervisor's socket.
        room: makes a memory of so many bytes, for this relay.
    """

    def __init__(
        self, connection: socket.socket, supervisor: str, room: Callable[[int, _Relay], int]
    ) -> None:
        self._stream = Stream(connection, lambda length: room(length, self))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._supervisor = supervisor
        self._page: wire.StatusPage | None = None

    def run(self) -> None:
        """Pass on what comes from either side, until one ends."""
        self._socket.connect(self._supervisor)
        if not self._introduce():
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream, selectors.EVENT_READ, self._from_rank)
            selector.register(self._socket, selectors.EVENT_READ, self._from_supervisor)
            goes_on = True
            while goes_on:
                goes_on = all(key.data() for key, _ in selector.select())

    def close(self) -> None:
        """End both connections."""
        self._stream.close()
        self._socket.close()
        if self._page is not None:
            self._page.close()

    def _introduce(self) -> bool:
        came = self._stream.receive()
        if came is None:
            return False
        hello = wire.decode_for_supervisor(came.payload)
        if not isinstance(hello, wire.Hello):
            raise ProtocolError(f"it began with a {type(hello).__name__}")
        packet = wire.encode(msgspec.structs.replace(hello, remote=True))
        return sockets.send(self._socket, packet)

    def _from_rank(self) -> bool:
        came = self._stream.receive()
        if came is None:
            return False
        if came.kind is Kind.PAGE and self._page is not None:
            self._page.show(came.payload)
        elif came.kind in (Kind.MESSAGE, Kind.CARRYING):
            return self._pass_on(came)
        return True

    def _pass_on(self, came: Came) -> bool:
        descriptors = [] if came.descriptor is None else [came.descriptor]
        try:
            return sockets.send(self._socket, came.payload, descriptors)
        finally:
            close_all(descriptors)

    def _from_supervisor(self) -> bool:
        try:
            packet, descriptors, _, _ = socket.recv_fds(
                self._socket, wire.MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX
            )
        except ConnectionError:
            return False
        if not packet:
            return False
        parcel = Parcel(packet)
        if descriptors:
            parcel = self._welcomed(packet, descriptors)
        try:
            while not parcel.send_next(self._stream):
                pass
        except OSError:
            return False
        return True

    def _welcomed(self, packet: bytes, descriptors: list[int]) -> Parcel:
        """Keep the page, and give what there is to restore; the rest is of use only here."""
        page, lock, output, *state = descriptors
        self._page = wire.StatusPage(memoryview(mmap.mmap(page, wire.PAGE_BYTES)))
        close_all([page, lock, output])
        welcome = wire.decode_for_worker(packet)
        if not state or not isinstance(welcome, wire.Welcome) or welcome.memory is None:
            return Parcel(packet)
        return Parcel(packet, state[0], welcome.memory.offset + welcome.memory.length)

    def expected(self) -> int:
        """How many bytes of a snapshot are still to come."""
        return self._stream.expected

    def ask_back(self, length: int) -> None:
        """Have the supervisor let go of memory, if it can."""
        short = wire.Short(length, memory.available())
        sockets.send(self._socket, wire.encode(short))
