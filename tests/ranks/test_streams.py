"""Frames over TCP: who is let in, and what comes out of what goes in."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from ckptd.errors import ProtocolError
from ckptd.host import memory, streams
from ckptd.host.streams import FRAME_BYTES_MAX, Kind, Parcel, Stream

SECRET = b"s" * 32


def connections() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with streams.listener(0) as listening:
        one = socket.create_connection(("localhost", listening.getsockname()[1]))
        other, _ = listening.accept()
    for end in (one, other):
        end.settimeout(5)
    return one, other


@pytest.fixture
def pair() -> Iterator[tuple[Stream, Stream]]:
    """Both ends of a stream."""
    one, other = map(Stream, connections())
    yield one, other
    one.close()
    other.close()


# ------------------------------------------------------------------ who is who


def proofs(worker: bytes, supervisor: bytes) -> tuple[str, str]:
    """What each end thinks of the other: empty if it is let in."""
    thoughts = {}
    ends = connections()

    def prove(end: socket.socket, secret: bytes, is_worker: bool) -> None:
        try:
            streams.prove(end, secret, worker=is_worker)
            thoughts[is_worker] = ""
        except (ProtocolError, OSError) as error:
            thoughts[is_worker] = str(error)
            end.close()

    tasks = zip(ends, (worker, supervisor), (True, False), strict=True)
    threads = [threading.Thread(target=prove, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for end in ends:
        end.close()
    return thoughts[True], thoughts[False]


def test_both_know_the_secret() -> None:
    """Then both let the other in."""
    assert proofs(SECRET, SECRET) == ("", "")


def test_another_secret() -> None:
    """Neither lets the other in, and a supervisor shows such a worker nothing."""
    worker, supervisor = proofs(SECRET, b"t" * 32)
    assert "the secret is not that of the attempt that runs there" in worker
    assert "does not know the secret" in supervisor


def test_a_supervisor_that_knows_nothing() -> None:
    """Who says yes to every proof proves nothing."""
    worker, impostor = connections()

    def pretend() -> None:
        greeting = streams._exactly(impostor, 40)
        impostor.sendall(greeting)  # the same number back: the worker's own proof would fit it
        impostor.sendall(streams._exactly(impostor, 32))

    thread = threading.Thread(target=pretend)
    thread.start()
    with worker, impostor, pytest.raises(ProtocolError, match="does not know"):
        streams.prove(worker, SECRET, worker=True)
    thread.join()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: here.and.there\r\n\r\n", b"\0" * 99])
def test_something_else_answers(said: bytes) -> None:
    """It is no ckptd, for either end."""
    for worker in (True, False):
        one, other = connections()
        other.sendall(said)
        with one, other, pytest.raises(ProtocolError, match="no ckptd"):
            streams.prove(one, SECRET, worker=worker)


def test_silence_ends() -> None:
    """Nobody is waited for without end."""
    one, other = connections()
    one.settimeout(0.05)
    with one, other, pytest.raises(TimeoutError):
        streams.prove(one, SECRET, worker=False)


# ------------------------------------------------------------------ frames


def made(content: bytes) -> int:
    """A memory."""
    descriptor = memory.make("test", len(content))
    os.pwrite(descriptor, content, 0)
    return descriptor


def test_a_message(pair: tuple[Stream, Stream]) -> None:
    """Comes as it was, and then the end."""
    one, other = pair
    assert Parcel(b"packet").send_next(one)
    came = other.receive()
    assert came == (Kind.MESSAGE, b"packet", None)
    one.close()
    assert other.receive() is None


@pytest.mark.parametrize("length", [0, 1, FRAME_BYTES_MAX, 3 * FRAME_BYTES_MAX + 5])
def test_a_memory(pair: tuple[Stream, Stream], length: int) -> None:
    """Comes whole, however long it is, though other messages come between its pieces."""
    one, other = pair
    content = os.urandom(length)
    came = []

    def take() -> None:
        while (frame := other.receive()) is not None:
            came.append(frame)

    thread = threading.Thread(target=take)
    thread.start()
    # An arena may be longer than what is in it.
    parcel = Parcel(b"carrying", made(content + b"not this"), length)
    while not parcel.send_next(one):
        one.send(Kind.MESSAGE, b"between")
    one.close()
    thread.join()
    assert sum(frame.payload == b"between" for frame in came) >= 1 + length // FRAME_BYTES_MAX
    last = came[-1]
    assert (last.kind, last.payload) == (Kind.CARRYING, b"carrying")
    assert os.pread(last.descriptor, length + 9, 0) == content
    os.close(last.descriptor)
    assert other.expected == 0


def test_what_was_damaged_on_its_way() -> None:
    """One bit is found."""
    one, other = connections()
    receiving = Stream(other)
    frame = bytearray(
        streams._HEAD.pack(Kind.MESSAGE, 4, streams.xxhash.xxh3_64_intdigest(b"good"))
    )
    frame += b"goof"
    one.sendall(frame)
    with one, pytest.raises(ProtocolError, match="damaged on its way"):
        receiving.receive()
    receiving.close()


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Kind.PIECE, b"of nothing"),
        (Kind.CARRYING, b"nothing"),
        (9, b"?"),
        (Kind.MESSAGE, bytes(FRAME_BYTES_MAX + 1)),
    ],
)
def test_no_such_frame(pair: tuple[Stream, Stream], kind: Kind, payload: bytes) -> None:
    """What fits nothing that came before is an error of the protocol."""
    one, other = pair
    one.send(kind, payload)
    with pytest.raises(ProtocolError):
        other.receive()


def test_more_than_was_announced(pair: tuple[Stream, Stream]) -> None:
    """A memory gets no longer than it was said to be, nor is it there before it is whole."""
    one, other = pair
    one.send(Kind.MEMORY, (5).to_bytes(8, "big"))
    one.send(Kind.PIECE, b"1234")
    one.send(Kind.CARRYING, b"")
    one.send(Kind.PIECE, b"56")
    other.receive()
    other.receive()
    assert other.expected == 1
    for _ in range(2):
        with pytest.raises(ProtocolError):
            other.receive()


def test_an_end_in_the_middle(pair: tuple[Stream, Stream]) -> None:
    """Half a frame is none, and half a memory is let go of."""
    one, other = pair
    one.send(Kind.MEMORY, (5).to_bytes(8, "big"))
    other.receive()
    one._socket.sendall(streams._HEAD.pack(Kind.PIECE, 5, 0) + b"12")
    one.close()
    assert other.receive() is None
    other.close()
    assert other.expected == 0
