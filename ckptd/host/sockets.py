"""Packets over a Unix socket, with descriptors riding on them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress


def send_or_drop(connection: socket.socket, packet: bytes) -> None:
    """Send one packet, unless the other end has stopped reading or is gone."""
    with suppress(BlockingIOError, ConnectionError):
        connection.send(packet, socket.MSG_DONTWAIT)


def send(connection: socket.socket, packet: bytes, descriptors: Sequence[int] = ()) -> bool:
    """Send one packet; False when nobody is at the other end any more."""
    try:
        if descriptors:
            socket.send_fds(connection, [packet], list(descriptors))
        else:
            connection.send(packet)
    except ConnectionError:  # a broken pipe is one of them
        return False
    return True


def shut(connection: socket.socket) -> None:
    """End a connection, and whoever waits for it in another thread; the descriptor stays."""
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end of a Unix socket; 0: it is in a namespace that we can't see."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    return int(struct.unpack("3i", credentials)[0])
