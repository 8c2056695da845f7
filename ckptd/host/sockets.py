"""Packets over a Unix socket, with descriptors riding on them."""

from __future__ import annotations

import socket
from collections.abc import Sequence


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
