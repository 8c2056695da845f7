"""The socket that the worker and the command line talk to.

It lies in a directory of its own, readable by its owner alone, under a short path (the name of a
Unix socket may have 107 bytes, and a run's directory can be deep).
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ckptd import wire
from ckptd.errors import CkptdError
from ckptd.host import sockets

_DESCRIPTORS_MAX: Final = 4
_ASK_BOUND_S: Final = 3600.0
_PREFIX: Final = "ckptd-"
_NAME: Final = "s"


class Peer:
    """One connection: a worker's or a command-line tool's."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        """Readable when a message came, or the end."""
        return self._socket.fileno()

    def pid(self) -> int:
        """The process at the other end; 0: it can't be seen from here."""
        return sockets.peer_pid(self._socket)

    def receive(self) -> tuple[wire.ToSupervisor, list[int]] | None:
        """The next message and the descriptors that ride on it; None: the peer is gone.

        Raises:
            ProtocolError: it is no message.
        """
        try:
            packet, descriptors = self._receive()
        except ConnectionError:
            return None
        if not packet:
            return None
        return wire.decode_for_supervisor(packet), descriptors

    def _receive(self) -> tuple[bytes, list[int]]:
        # A peer that died before it had read all from us resets the connection. The system tells
        # that once, and ahead of what the peer had sent, which is still there.
        for last_try in (False, True):
            try:
                packet, descriptors, _, _ = socket.recv_fds(
                    self._socket, wire.MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX
                )
            except ConnectionResetError:
                if last_try:
                    raise
            else:
                return packet, descriptors
        raise AssertionError("one of two tries returns or raises")

    def send(self, message: wire.ToWorker, descriptors: Sequence[int] = ()) -> None:
        """Send a message; a peer that is gone does not get it, and that is seen by `receive`."""
        sockets.send(self._socket, wire.encode(message), descriptors)

    def send_or_drop(self, message: wire.ToWorker) -> None:
        """Send what may get lost: a peer that does not read must not hold us up."""
        sockets.send_or_drop(self._socket, wire.encode(message))

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


class Server:
    """The listening socket."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.address = str(self._directory / _NAME)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(self.address)
        self._socket.listen(16)

    def fileno(self) -> int:
        """Readable when somebody connects."""
        return self._socket.fileno()

    def accept(self) -> Peer:
        """The connection of who connected."""
        return Peer(self._socket.accept()[0])

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._socket.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def ask(address: str, what: str, bound_s: float = _ASK_BOUND_S) -> wire.Answer:
    """Ask a running supervisor something and wait for its answer.

    Raises:
        CkptdError: it is gone, or does not answer within the bound.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(bound_s)
        try:
            connection.connect(address)
            connection.send(wire.encode(wire.Ask(what)))
            packet = connection.recv(wire.MESSAGE_BYTES_MAX)
        except OSError as error:
            raise CkptdError(f"the supervisor does not answer: {error}") from error
    if not packet:
        raise CkptdError("the supervisor ended before it answered")
    answer = wire.decode_for_worker(packet)
    if not isinstance(answer, wire.Answer):
        raise CkptdError(f"the supervisor answered with a {type(answer).__name__}")
    return answer


def remove_left_behind(address: str) -> None:
    """Remove the socket of a supervisor on this machine that was killed."""
    path = Path(address)
    if path.name == _NAME and path.parent.name.startswith(_PREFIX):
        path.unlink(missing_ok=True)
        with suppress(OSError):  # gone already, or there is something in it that is not ours
            path.parent.rmdir()


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that came with a message nobody wanted."""
    for descriptor in descriptors:
        os.close(descriptor)
