"""Packets over a Unix socket, with descriptors riding on them."""

from __future__ import annotations

import socket
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
