"""Frames over TCP, between a supervisor and the ranks on other machines.

Rules:

1. Nothing that a stranger says is believed, and nothing is told to it, before both ends have shown
   that they know the secret. It never travels: each end draws a number, and the other one answers
   with an HMAC of both. Only who proved itself gets a proof.
2. What follows is not encrypted, as the traffic of the process group is not: the network between
   the nodes of a job is trusted with its weights.
3. A frame is at most FRAME_BYTES_MAX long and carries a sum of its bytes, since TCP's own lets
   through one of 65,536 damaged packets, and a checkpoint is made of what comes.
4. The memory that rides on a message travels ahead of it in pieces. Other messages may travel
   between two pieces, so that a large snapshot holds up nobody.
5. A connection whose other end has vanished ends within about fifteen seconds.

Not `multiprocessing.connection`: its challenge is MD5 before Python 3.12, which machines in FIPS
mode refuse, both its ends prove the same thing, and it knows no time-outs.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final, NamedTuple

import xxhash

from ckptd.errors import ProtocolError
from ckptd.host import memory, sockets

FRAME_BYTES_MAX: Final = 1 << 20
#: How long an end may take to prove itself.
PROOF_S: Final = 10.0
_ENDS_S: Final = 5.0
_MAGIC: Final = b"ckptd-1\n"
_NUMBER_BYTES: Final = 32
_HEAD: Final = struct.Struct("!BIQ")  # kind, length, sum
_TOGETHER_MAX: Final = 1 << 14  # copying so little costs less than a packet of its own
_IDLE_S: Final = 6  # then it is asked whether the other end is there, ...
_ASK_EVERY_S: Final = 3
_ASKS: Final = 3  # ... so often
_UNANSWERED_MS: Final = 15_000


class Kind(IntEnum):
    """What a frame is."""

    MESSAGE = 0
    MEMORY = 1  # of so many bytes begins: eight bytes of length
    PIECE = 2  # of it
    CARRYING = 3  # a message on which the memory rides that came
    PAGE = 4  # the content of a status page


class Came(NamedTuple):
    """A frame that came; `descriptor` is of the memory that rides on it, and the caller's."""

    kind: Kind
    payload: bytes
    descriptor: int | None = None


class Stream:
    """One end of a connection, after both have proved themselves.

    Args:
        connection: is taken over.
        room: makes the memory for what comes, of so many bytes.
    """

    def __init__(
        self,
        connection: socket.socket,
        room: Callable[[int], int] = lambda length: memory.make("ckptd-came", length),
    ) -> None:
        self._socket, self._room = connection, room
        self._memory: int | None = None
        self._length = self._filled = 0
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASK_EVERY_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _ASKS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)

    def fileno(self) -> int:
        """Readable when a frame comes, or the end."""
        return self._socket.fileno()

    @property
    def expected(self) -> int:
        """How many bytes of a memory that has begun are still to come."""
        return self._length - self._filled

    def send(self, kind: Kind, payload: bytes | memoryview) -> None:
        """Send one frame.

        Raises:
            OSError: the connection has ended.
        """
        head = _HEAD.pack(kind, len(payload), xxhash.xxh3_64_intdigest(payload))
        if len(payload) <= _TOGETHER_MAX:
            self._socket.sendall(b"".join((head, payload)))
        else:
            self._socket.sendall(head)
            self._socket.sendall(payload)

    def receive(self) -> Came | None:
        """The next frame; None: the connection has ended. What came of a memory is kept here.

        Raises:
            ProtocolError: that is no frame, or it was damaged on its way.
            OSError: there is no room for the memory.
        """
        try:
            kind, length, total = _HEAD.unpack(_exactly(self._socket, _HEAD.size))
            if length > FRAME_BYTES_MAX:
                raise ProtocolError(f"a frame of {length} bytes; at most {FRAME_BYTES_MAX} are")
            payload = _exactly(self._socket, length)
        except (EOFError, OSError):
            return None
        if xxhash.xxh3_64_intdigest(payload) != total:
            raise ProtocolError(f"a frame of {length} bytes was damaged on its way")
        try:
            came = Came(Kind(kind), payload)
        except ValueError:
            raise ProtocolError(f"a frame of an unknown kind {kind}") from None
        if came.kind is Kind.MEMORY:
            self._begin(int.from_bytes(payload, "big"))
        elif came.kind is Kind.PIECE:
            self._add(payload)
        elif came.kind is Kind.CARRYING:
            return came._replace(descriptor=self._whole())
        return came

    def finish(self) -> None:
        """Say that nothing follows, and wait until the other end has taken all and ends too."""
        self._socket.shutdown(socket.SHUT_WR)
        self._socket.settimeout(_ENDS_S)
        while self.receive() is not None:
            pass

    def shut(self) -> None:
        """End the connection for both ends; the descriptor stays."""
        sockets.shut(self._socket)

    def close(self) -> None:
        """End the connection; a memory that was not whole is dropped."""
        self._socket.close()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None
            self._length = self._filled

    def _begin(self, length: int) -> None:
        if self._memory is not None:
            raise ProtocolError("a memory begins within another one")
        self._length, self._filled = length, 0
        self._memory = self._room(length)

    def _add(self, piece: bytes) -> None:
        if self._memory is None or self._filled + len(piece) > self._length:
            raise ProtocolError(f"a piece of {len(piece)} bytes that belongs to no memory")
        view = memoryview(piece)
        while view:
            written = os.pwrite(self._memory, view, self._filled)
            self._filled += written
            view = view[written:]

    def _whole(self) -> int:
        if self._memory is None or self._filled != self._length:
            raise ProtocolError(f"a message on a memory of which {self._filled} bytes came")
        descriptor, self._memory = self._memory, None
        return descriptor


class Parcel:
    """A message, and maybe the memory that rides on it, on its way.

    Args:
        packet: the message.
        descriptor: of the memory, which is mapped and closed; None: it has none.
        length: how many bytes of it.
    """

    def __init__(self, packet: bytes, descriptor: int | None = None, length: int = 0) -> None:
        self._packet = packet
        self._memory: memoryview | None = None
        self._at = -1
        if descriptor is not None:
            try:
                self._memory = memory.readable(descriptor)[:length]
            finally:
                os.close(descriptor)

    def send_next(self, stream: Stream) -> bool:
        """Send its next frame; whether that was the last one.

        Raises:
            OSError: the connection has ended.
        """
        if self._memory is None:
            stream.send(Kind.MESSAGE, self._packet)
            return True
        if self._at < 0:
            stream.send(Kind.MEMORY, len(self._memory).to_bytes(8, "big"))
            self._at = 0
        elif self._at < len(self._memory):
            piece = self._memory[self._at : self._at + FRAME_BYTES_MAX]
            stream.send(Kind.PIECE, piece)
            self._at += len(piece)
        else:
            stream.send(Kind.CARRYING, self._packet)
            return True
        return False


# ------------------------------------------------------------------ who is who


def listener(port: int) -> socket.socket:
    """A socket that listens on every address of this machine; port 0: any that is free.

    Raises:
        OSError: the port can't be had.
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=1024)


def connect(host: str, port: int, secret: bytes) -> Stream:
    """Connect to a supervisor.

    Raises:
        OSError: nobody answers there.
        ProtocolError: who answers is not the supervisor that gave us the secret.
    """
    connection = socket.create_connection((host, port), PROOF_S)
    try:
        prove(connection, secret, worker=True)
    except BaseException:
        connection.close()
        raise
    return Stream(connection)


def prove(connection: socket.socket, secret: bytes, *, worker: bool) -> None:
    """Show the other end that the secret is known here, and see that it is there too.

    Raises:
        OSError: the connection ended, or took too long.
        ProtocolError: the other end does not know it.
    """
    own = secrets.token_bytes(_NUMBER_BYTES)
    connection.sendall(_MAGIC + own)
    try:
        greeting = _exactly(connection, len(_MAGIC) + _NUMBER_BYTES)
        if not greeting.startswith(_MAGIC):
            raise ProtocolError("what answers there is no ckptd of this version")
        other = greeting[len(_MAGIC) :]
        numbers = own + other if worker else other + own
        by_worker, by_supervisor = (
            hmac.digest(secret, who + numbers, "sha256") for who in (b"worker", b"supervisor")
        )
        if worker:  # first: a supervisor shows a stranger nothing
            connection.sendall(by_worker)
            _check(connection, by_supervisor)
        else:
            _check(connection, by_worker)
            connection.sendall(by_supervisor)
    except EOFError:
        raise ProtocolError("the secret is not that of the attempt that runs there") from None


def _check(connection: socket.socket, proof: bytes) -> None:
    if not hmac.compare_digest(_exactly(connection, len(proof)), proof):
        raise ProtocolError("it does not know the secret of this attempt")


def _exactly(connection: socket.socket, length: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: it ended before.
    """
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(buffer)
