"""The end of the connection that is in the training process: a supervisor on another machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until

from ckptd import wire
from ckptd.errors import CkptdError
from ckptd.host import memory, streams
from ckptd.host.streams import Came, Kind, Parcel, Stream
from ckptd.worker import bridge, link
from ckptd.worker.arena import Arenas
from ckptd.worker.link import Link

HELLO = wire.Hello(wire.PROTOCOL, 7, 1, 2, {})
SECRET = bytes(32)
WELCOME = wire.Welcome("job", "/run", 1, None, None, 1)


class Far:
    """The supervisor's end, and a worker's link to it.

    Attributes:
        orphaned: whether the link found that its supervisor is gone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, welcome: wire.Welcome = WELCOME) -> None:
        self.listening = streams.listener(0)
        port = self.listening.getsockname()[1]
        invitation = wire.Invitation("localhost", port, SECRET)
        monkeypatch.setenv(wire.ENV_REMOTE, invitation.text())
        self.welcome = welcome
        self.orphaned = threading.Event()
        thread = threading.Thread(target=self._greet)
        thread.start()
        self.arenas = Arenas()
        self.link = Link("/nowhere", HELLO, self.arenas, lambda _: self.orphaned.set())
        thread.join()

    def _greet(self) -> None:
        connection, _ = self.listening.accept()
        streams.prove(connection, SECRET, worker=False)
        self.stream = Stream(connection)
        assert self.receive() == HELLO
        self.send(self.welcome)

    def send(self, message: wire.ToWorker) -> None:
        self.stream.send(Kind.MESSAGE, wire.encode(message))

    def came(self) -> Came:
        """The next frame that is no page."""
        while (came := self.stream.receive()) is not None:
            if came.kind is not Kind.PAGE:
                return came
        raise EOFError

    def receive(self) -> wire.ToSupervisor:
        return wire.decode_for_supervisor(self.came().payload)

    def snapshot(self, generation: int, length: int) -> None:
        """Have the worker send one."""
        arena = self.arenas.take(length)
        arena.mapping[:length] = os.urandom(1) * length
        message = wire.Snapshot(generation, 3, wire.Place(length, 0), 0)
        self.arenas.sent(generation, arena)
        self.link.send(message, [arena.descriptor])
        self.arenas.let_go(arena)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    monkeypatch.setattr(memory, "available", lambda: 2**50)
    far = Far(monkeypatch)
    yield far
    far.stream.close()
    far.listening.close()


def test_a_request_comes_into_the_page(far: Far) -> None:
    """And the supervisor is told that it stands there, and where the worker is since."""
    words = far.link.page.words
    words[wire.WORD_DEPTH], words[wire.WORD_LOOPS] = 1, 6
    far.send(wire.Asked(9))
    assert far.receive() == wire.Seen(9, ((0, 6),))
    assert words[wire.WORD_REQUEST] == 9
    assert far.link.page.agreed(9) is None
    far.send(wire.Agreed(9, ((0, 7),)))
    wait_until(lambda: far.link.page.agreed(9) == ((0, 7),))
    far.send(wire.Agreed(10, None))
    wait_until(lambda: far.link.page.agreed(10) == ())


def test_where_it_is_counts_after_the_request(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that passes a safe point while the request arrives is where it is after that."""
    words = far.link.page.words
    words[wire.WORD_DEPTH] = 1

    def passes(_: float) -> None:
        assert words[wire.WORD_REQUEST] == 9
        words[wire.WORD_LOOPS] += 1

    monkeypatch.setattr(bridge.time, "sleep", passes)
    far.send(wire.Asked(9))
    assert far.receive() == wire.Seen(9, ((0, 1),))


def test_progress_goes_over(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    """About once a second, if there is any; and with what is said, at once."""
    far.link.page.words[wire.WORD_STEP] = 5
    while (came := far.stream.receive()) is not None and came.kind is not Kind.PAGE:
        pass
    assert came is not None
    far.link.page.words[wire.WORD_STEP] = 6
    far.link.send(wire.Said("six"))
    kinds = []
    while len(kinds) < 2:
        came = far.stream.receive()
        assert came is not None
        kinds.append(came.kind)
    page = wire.StatusPage(memoryview(bytearray(wire.PAGE_BYTES)))
    assert set(kinds) == {Kind.PAGE, Kind.MESSAGE}
    if came.kind is Kind.PAGE:
        page.show(came.payload)
        assert page.words[wire.WORD_STEP] == 6


def test_a_memory_is_free_when_it_is_over_there(far: Far) -> None:
    """Not before, and whatever the supervisor does with it."""
    length = 64 << 20
    far.snapshot(1, length)
    first = far.arenas._sent[1]
    assert far.stream.receive() is not None  # it has begun
    assert far.arenas.take(length) is not first
    came = far.came()
    while came.kind is not Kind.CARRYING:
        came = far.came()
    assert came.descriptor is not None
    os.close(came.descriptor)
    wait_until(lambda: not far.arenas._sent)
    far.send(wire.Released(1))  # changes nothing any more
    far.send(wire.Durable(1))
    assert far.link.receipt(1) == wire.Durable(1)
    assert far.arenas.take(length) is first


def test_a_notice_does_not_wait(far: Far) -> None:
    """While a snapshot is on its way, a signal goes ahead of the rest; anything else keeps its
    order."""
    far.snapshot(1, 64 << 20)
    far.link.send(wire.Said("after it"))
    far.link.send(wire.Notice(15))
    order = []
    while len(order) < 3:
        came = far.came()
        if came.kind in (Kind.MESSAGE, Kind.CARRYING):
            order.append(type(wire.decode_for_supervisor(came.payload)))
    assert order == [wire.Notice, wire.Snapshot, wire.Said]


def test_snapshots_do_not_pile_up(far: Far) -> None:
    """Where the network is slower than they come, the third waits for the first."""
    far.snapshot(1, 32 << 20)
    far.snapshot(2, 32 << 20)
    third = threading.Thread(target=far.snapshot, args=(3, 32 << 20))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    while far.came().kind is not Kind.CARRYING:
        pass
    third.join(5)
    assert not third.is_alive()


def test_the_end_of_the_process_waits_for_what_was_said(far: Far) -> None:
    """Until the supervisor has it, also for a large snapshot; and it makes no orphan."""
    far.snapshot(1, 64 << 20)
    far.link.send(wire.Bye(finished=True))
    finishing = threading.Thread(target=far.link.finish)
    finishing.start()
    came = far.came()
    while came.kind is not Kind.MESSAGE:
        assert finishing.is_alive()
        came = far.came()
    assert wire.decode_for_supervisor(came.payload) == wire.Bye(finished=True)
    finishing.join(0.1)
    assert finishing.is_alive(), "what is not read yet would be lost"
    far.stream.close()
    finishing.join(5)
    assert not finishing.is_alive()
    assert not far.orphaned.is_set()


def test_the_supervisor_is_gone(far: Far) -> None:
    """The link learns it, whoever waits for a receipt too, and nothing blocks any more."""
    far.stream.close()
    assert far.link.receipt(1) is None
    assert far.orphaned.wait(5)
    wait_until(lambda: not far.link.send(wire.Said("anybody?")))
    for generation in range(1, 5):
        far.snapshot(generation, 100)


def test_a_fork_does_not_hold_the_connection(far: Far) -> None:
    """A loader's worker that outlives its parent must not look like that parent."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # until the test ends
        os._exit(0)
    far.link._bridge._stream._socket.close()  # as the parent's death would
    far.stream._socket.settimeout(2)
    assert far.stream._socket.recv(1) == b""
    os.close(writing)
    os.waitpid(child, 0)


def test_it_is_killed_from_there() -> None:
    """Nobody there can send it a signal."""
    source = f"""
import threading
from ckptd import wire
from ckptd.worker.link import Link
from ckptd.worker.arena import Arenas
Link("/nowhere", wire.Hello({wire.PROTOCOL}, 7, 1, 2, {{}}), Arenas(), print)
threading.Event().wait()
"""
    listening = streams.listener(0)
    invitation = wire.Invitation("localhost", listening.getsockname()[1], SECRET)
    environment = {**os.environ, wire.ENV_REMOTE: invitation.text()}
    worker = subprocess.Popen([sys.executable, "-c", source], env=environment)
    connection, _ = listening.accept()
    streams.prove(connection, SECRET, worker=False)
    stream = Stream(connection)
    for message in (WELCOME, wire.Kill()):
        stream.send(Kind.MESSAGE, wire.encode(message))
    assert worker.wait(30) == -signal.SIGKILL
    stream.close()
    listening.close()


# ------------------------------------------------------------------ which way


def test_no_way_to_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried is said, and what to look at."""
    monkeypatch.setattr(link, "_PAUSE_S", 0.0)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv(wire.ENV_REMOTE, wire.Invitation("localhost", port, SECRET).text())
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.2")
    with pytest.raises(CkptdError) as caught:
        link._connected("/nowhere")
    said = str(caught.value)
    assert f"can't be reached from {os.uname().nodename}" in said
    assert "a socket of this machine (/nowhere: No such file or directory)" in said
    assert f"localhost, TCP port {port} ([Errno 111] Connection refused)" in said
    assert f"127.0.0.2, TCP port {port} ([Errno 111] Connection refused)" in said
    assert "`ckptd launch --listen HOST:PORT`" in said


def test_a_name_that_only_slurm_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where srun was started is where the supervisor is: the second way."""
    with streams.listener(0) as listening:
        port = listening.getsockname()[1]
        invitation = wire.Invitation("no-such-host.invalid", port, SECRET)
        monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")

        def greet() -> None:
            connection, _ = listening.accept()
            streams.prove(connection, SECRET, worker=False)
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        link._stream(invitation, "").close()
        thread.join()


def test_the_machine_itself_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that sees the supervisor's socket takes no detour."""
    monkeypatch.setenv(wire.ENV_REMOTE, "not read")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        connection, across = link._connected(str(tmp_path / "s"))
    assert across is None
    connection.close()


def test_a_state_to_restore_comes_with_the_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a memory of this machine."""
    content = os.urandom(3 << 20)

    class Restoring(Far):
        def send(self, message: wire.ToWorker) -> None:
            descriptor = memory.make("state", len(content))
            os.pwrite(descriptor, content, 0)
            parcel = Parcel(wire.encode(message), descriptor, len(content))
            while not parcel.send_next(self.stream):
                pass

    place = wire.Place(len(content), 0)
    far = Restoring(monkeypatch, wire.Welcome("job", "/run", 2, None, None, 1, memory=place))
    (descriptor,) = far.link.snapshot
    assert os.pread(descriptor, len(content) + 1, 0) == content
    far.stream.close()
