"""The worker's connection: when it ends."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from ckptd import wire
from ckptd.host import memory
from ckptd.supervisor.server import Server
from ckptd.worker.arena import Arenas
from ckptd.worker.link import Link

BOUND_S = 10


def worker(address: str, said: int, waits: int) -> None:
    """A worker that forks, as a loader does, and is killed."""
    link = Link(address, wire.Hello(wire.PROTOCOL, os.getpid(), 0, 1, {}), Arenas(), lambda _: None)
    if os.fork() == 0:
        os.write(said, str(int(link.send(wire.Said("from a fork")))).encode())
        os.read(waits, 1)
        os._exit(0)
    signal.pause()  # until it is killed


def test_a_fork_does_not_hold_it(tmp_path: Path) -> None:
    """The supervisor sees a worker's end at once, also when that had forked: a loader's workers
    outlive it for seconds. And it hears nothing from them."""
    server = Server()
    said, says = os.pipe()
    waits, goes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(goes)
        try:
            worker(server.address, says, waits)
        finally:
            os._exit(1)
    try:
        peer = server.accept()
        peer.receive()
        page, lock = memory.make("ckptd-status", wire.PAGE_BYTES), os.open(os.devnull, os.O_RDONLY)
        peer.send(wire.Welcome("job", str(tmp_path), 1, None, None, 2), [page, lock, os.pipe()[0]])
        assert os.read(said, 1) == b"0", "it was not sent"
        os.kill(pid, signal.SIGKILL)
        readable, _, _ = select.select([peer], [], [], BOUND_S)
        assert readable
        assert peer.receive() is None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(goes)
        server.close()
