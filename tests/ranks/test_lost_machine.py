"""A machine that vanishes says nothing: both ends have to find out, over a cable that is pulled."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import wait_until

from ckptd import wire
from ckptd.host import memory, streams
from ckptd.supervisor.relay import Relays
from ckptd.supervisor.server import Server

#: Of this run alone: another one may lay its cable at the same time.
NET = f"10.{os.getpid() % 250}.{os.getpid() // 250 % 250}"
HERE, THERE = f"{NET}.1", f"{NET}.2"
SHORT = {"_IDLE_S": 1, "_ASK_EVERY_S": 1, "_ASKS": 2, "_UNANSWERED_MS": 3000}
WORKER = f"""
import threading
from ckptd import wire
from ckptd.host import streams
from ckptd.worker.arena import Arenas
from ckptd.worker.link import Link
for name, value in {SHORT}.items():
    setattr(streams, name, value)
gone = threading.Event()
link = Link("/nowhere", wire.Hello(wire.PROTOCOL, 7, 1, 2, {{}}), Arenas(), lambda _: gone.set())
print("attached", flush=True)
while not gone.wait(0.1):
    link.page.words[wire.WORD_STEP] += 1
print("orphaned", flush=True)
"""


@pytest.fixture
def cable() -> Iterator[tuple[list[str], Callable[[], object]]]:
    """Another machine: the first words of a command there, and what pulls the cable to it."""
    name = f"ckptd{os.getpid() % 10**6}"

    def ip(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)

    if not Path("/usr/sbin/ip").exists() or ip("netns", "add", name).returncode:
        pytest.skip("no network namespace can be made here")
    laid = [
        ip("link", "add", name, "type", "veth", "peer", "name", "cable", "netns", name),
        ip("addr", "add", f"{HERE}/30", "dev", name),
        ip("link", "set", name, "up"),
        ip("-n", name, "addr", "add", f"{THERE}/30", "dev", "cable"),
        ip("-n", name, "link", "set", "cable", "up"),
    ]
    try:
        if any(one.returncode for one in laid):
            pytest.skip(f"no cable can be laid here: {[one.stderr for one in laid]}")
        yield ["ip", "netns", "exec", name], lambda: ip("link", "set", name, "down")
    finally:
        ip("netns", "del", name)


def unacknowledged(stream: streams.Stream) -> int:
    """Bytes on their way to the other end."""
    return int.from_bytes(fcntl.ioctl(stream.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def test_both_ends_notice(
    cable: tuple[list[str], Callable[[], object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank whose machine vanished has detached for the supervisor, and is an orphan itself."""
    prefix, pull = cable
    for key, value in SHORT.items():
        monkeypatch.setattr(streams, key, value)
    server = Server()
    relays = Relays(HERE, 0, server.address, tmp_path, print)
    environment = {**os.environ, wire.ENV_REMOTE: relays.invite().text()}
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", WORKER], env=environment, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        peer = server.accept()
        received = peer.receive()
        assert received is not None
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
        page = memory.make("page", wire.PAGE_BYTES)
        peer.send(wire.Welcome("job", "/run", 1, None, None, 1), [page, *others])
        assert worker.stdout.readline() == "attached\n"
        (relay,) = relays._relays
        wait_until(lambda: unacknowledged(relay._stream) == 0)
        pull()
        assert peer.receive() is None
        assert worker.stdout.readline() == "orphaned\n"
    relays.close()
    server.close()


def test_how_long_that_is() -> None:
    """About fifteen seconds, whether something is on its way or not."""
    one = streams._IDLE_S + streams._ASKS * streams._ASK_EVERY_S
    assert one == streams._UNANSWERED_MS / 1000 == 15
