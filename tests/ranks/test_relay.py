"""The supervisor's end of a rank on another machine, and who else knocks there."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until

from ckptd import wire
from ckptd.errors import CkptdError
from ckptd.host import memory, streams
from ckptd.host.streams import Kind, Parcel, Stream
from ckptd.supervisor import relay
from ckptd.supervisor.relay import Relays
from ckptd.supervisor.server import Peer, Server

HELLO = wire.Hello(wire.PROTOCOL, 7, 1, 2, {})
PLACE = wire.Place(5, 0)
SNAPSHOT = wire.Snapshot(1, 3, PLACE, 0)
WELCOME = wire.Welcome("job", "/run", 1, None, None, 1)


class Station:
    """A supervisor's two listening sockets, without a supervisor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = Server()
        self.said: list[str] = []
        self.relays = Relays("localhost", 0, self.server.address, directory, self.said.append)
        self.invitation = self.relays.invite()

    def connect(self) -> Stream:
        one = self.invitation
        return streams.connect(one.host, one.port, one.secret)

    def knock(self) -> socket.socket:
        """A stranger's connection."""
        return socket.create_connection(("localhost", self.invitation.port))

    def join(self) -> tuple[Stream, Peer]:
        """A rank, and what the supervisor sees of it."""
        stream = self.connect()
        send(stream, HELLO)
        peer = self.server.accept()
        assert peer.receive() == (wire.Hello(wire.PROTOCOL, 7, 1, 2, {}, remote=True), [])
        return stream, peer


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    station = Station(tmp_path)
    yield station
    station.relays.close()
    station.server.close()


def send(stream: Stream, message: wire.ToSupervisor, content: bytes | None = None) -> None:
    descriptor = None
    if content is not None:
        descriptor = memory.make("test", len(content))
        os.pwrite(descriptor, content, 0)
    parcel = Parcel(wire.encode(message), descriptor, len(content or b""))
    while not parcel.send_next(stream):
        pass


def receive(stream: Stream) -> tuple[wire.ToWorker, int | None]:
    """The next message, and the memory on it."""
    while (came := stream.receive()) is not None:
        if came.kind in (Kind.MESSAGE, Kind.CARRYING):
            return wire.decode_for_worker(came.payload), came.descriptor
    raise AssertionError("it has ended")


def welcome(peer: Peer, content: bytes | None = None) -> wire.StatusPage:
    """Welcome a rank; the page that the supervisor sees."""
    page = memory.make("page", wire.PAGE_BYTES)
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    state, place = [], None
    if content is not None:
        state, place = [memory.make("state", len(content))], wire.Place(0, len(content))
        os.pwrite(state[0], content, 0)
    message = wire.Welcome("job", "/run", 1, None, None, 1, memory=place)
    peer.send(message, [page, *others, *state])
    return wire.StatusPage(memoryview(mmap.mmap(page, wire.PAGE_BYTES)))


# ------------------------------------------------------------------ a rank


def test_messages_both_ways(station: Station) -> None:
    """The relay passes them on, and ends with the rank."""
    stream, peer = station.join()
    welcome(peer)
    assert receive(stream) == (WELCOME, None)
    send(stream, wire.Said("hello"))
    assert peer.receive() == (wire.Said("hello"), [])
    peer.send(wire.Asked(5))
    assert receive(stream) == (wire.Asked(5), None)
    stream.close()
    assert peer.receive() is None
    assert station.said == []


def test_the_supervisor_lets_go(station: Station) -> None:
    """When it closes its end, the rank's connection ends."""
    stream, peer = station.join()
    peer.close()
    assert stream.receive() is None


def test_a_snapshot_comes_over(station: Station) -> None:
    """Its memory is one of this machine then, and rides on the message as a local worker's."""
    stream, peer = station.join()
    content = os.urandom(3 << 20)
    send(stream, SNAPSHOT, content)
    received = peer.receive()
    assert received is not None
    message, (descriptor,) = received
    assert message == SNAPSHOT
    assert os.pread(descriptor, len(content) + 1, 0) == content


def test_a_state_goes_over(station: Station) -> None:
    """What is to be restored from memory goes with the welcome."""
    stream, peer = station.join()
    content = os.urandom(3 << 20)
    welcome(peer, content)
    message, descriptor = receive(stream)
    assert isinstance(message, wire.Welcome)
    assert descriptor is not None
    assert os.pread(descriptor, len(content) + 1, 0) == content


def test_progress_is_shown(station: Station) -> None:
    """The page here shows what the page there does; a request here stays."""
    stream, peer = station.join()
    page = welcome(peer)
    receive(stream)
    page.words[wire.WORD_REQUEST] = 77
    there = wire.StatusPage(memoryview(bytearray(wire.PAGE_BYTES)))
    there.words[wire.WORD_STEP], there.words[wire.WORD_DEPTH] = 12, 1
    there.words[wire.WORD_LOOPS] = 4
    there.write_values({"loss": 0.5})
    stream.send(Kind.PAGE, there.progress())
    wait_until(lambda: page.values())
    assert page.words[wire.WORD_STEP] == 12
    assert page.loops() == [wire.Loop(4, 0, False)]
    assert page.values() == {"loss": 0.5}
    assert page.words[wire.WORD_REQUEST] == 77


def test_nonsense_of_a_rank_ends_its_connection(station: Station) -> None:
    """And is said; the others go on."""
    _, other = station.join()
    stream, peer = station.join()
    stream.send(Kind.PIECE, b"of nothing")
    assert peer.receive() is None
    wait_until(lambda: station.said)
    assert "belongs to no memory" in station.said[0]
    station.join()
    other.send(wire.Asked(1))


def test_no_memory_for_what_comes(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor is asked to give some back; if it can't, the snapshot lies on the disk."""
    monkeypatch.setattr(memory, "available", lambda: 0)
    monkeypatch.setattr(relay, "_GIVEN_BACK_WITHIN_S", 0.0)
    stream, peer = station.join()
    send(stream, SNAPSHOT, b"12345")
    assert peer.receive() == (wire.Short(5, 0), [])
    received = peer.receive()
    assert received is not None
    _, (descriptor,) = received
    assert os.fstat(descriptor).st_dev == station.directory.stat().st_dev
    assert os.pread(descriptor, 9, 0) == b"12345"


def test_what_is_on_its_way_to_others_is_taken(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks send at once: what one has announced is not there for the next one."""
    monkeypatch.setattr(memory, "is_short", lambda length: length > 50_000)
    monkeypatch.setattr(relay, "_GIVEN_BACK_WITHIN_S", 0.0)
    (first, _), (second, peer) = station.join(), station.join()
    first.send(Kind.MEMORY, (40_000).to_bytes(8, "big"))
    wait_until(lambda: sum(one.expected() for one in station.relays._relays) == 40_000)
    second.send(Kind.MEMORY, (20_000).to_bytes(8, "big"))
    received = peer.receive()
    assert received is not None
    assert isinstance(received[0], wire.Short)


# ------------------------------------------------------------------ strangers


def test_strangers_hold_up_nobody(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent ones, more than there are places, ones that talk nonsense, and ones that trickle: a
    rank gets in all the same, and only so many threads wait for them."""
    monkeypatch.setattr(relay, "_PATIENCE_S", 0.05)
    before = threading.active_count()
    silent = [station.knock() for _ in range(3 * relay._STRANGERS_MAX)]
    for stranger in silent[::3]:
        stranger.sendall(b"GET / HTTP/1.1\r\n" * 9)
    for stranger in silent[1::3]:
        stranger.sendall(b"ck")
    began_s = time.monotonic()
    _, peer = station.join()
    wait_until(lambda: threading.active_count() - before <= relay._STRANGERS_MAX + 1)
    assert time.monotonic() - began_s < streams.PROOF_S / 2
    peer.send(wire.Asked(1))
    for stranger in silent:
        stranger.close()


def test_who_hangs_up_at_once(station: Station) -> None:
    """A flood of connections that end ends nothing else."""
    for _ in range(300):
        station.knock().close()
    station.join()
    assert station.said == []


def test_the_secret_of_an_earlier_attempt(station: Station) -> None:
    """What is left of it is a stranger."""
    earlier, station.invitation = station.invitation, station.relays.invite()
    with pytest.raises(CkptdError, match="not that of the attempt that runs there"):
        streams.connect(earlier.host, earlier.port, earlier.secret)
    station.join()


def test_nobody_is_let_in_without_an_attempt(tmp_path: Path) -> None:
    """Before the first one there is no secret that anybody could guess."""
    relays = Relays("localhost", 0, "/nowhere", tmp_path, print)
    with pytest.raises(CkptdError, match="not that of the attempt"):
        streams.connect("localhost", relays._port, b"")
    relays.close()


def test_a_port_that_is_taken(station: Station) -> None:
    """Is an error that names it."""
    port = station.invitation.port
    with pytest.raises(CkptdError, match=f"can't listen on TCP port {port}"):
        Relays("localhost", port, "/nowhere", station.directory, print)


def test_closed(station: Station) -> None:
    """Nobody gets in any more, and nobody waits."""
    station.relays.close()
    with pytest.raises(OSError, match="refused"):
        station.knock()


def test_an_invitation_in_the_environment() -> None:
    """Comes back as it was; something else is an error of the protocol."""
    invitation = wire.Invitation("fe80::1", 70, b"secret")
    assert wire.Invitation.read(invitation.text()) == invitation
    for text in ("", "host", "host,port,00", "host,1,xy", "host,1,00,1"):
        with pytest.raises(CkptdError, match="not what a supervisor sets"):
            wire.Invitation.read(text)
