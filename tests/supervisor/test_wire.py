"""The messages between supervisor and worker."""

from __future__ import annotations

import pytest

from ckptd import wire
from ckptd.errors import ProtocolError

FILES = [wire.Extent("state.json", 0, 10), wire.Extent("model.safetensors", 10, 20)]


def laid(table: wire.Table) -> tuple[memoryview, wire.Place]:
    """A memory with a table behind 30 bytes of files, and the table's place."""
    listed = wire.encode_table(table)
    return memoryview(bytes(30) + listed), wire.Place(30, len(listed))


def test_a_table_of_any_length() -> None:
    """A table comes back, however many files and outputs it names; the message stays small."""
    table = wire.Table(FILES, [f"/{'x' * 200}/{number}" for number in range(5000)])
    memory, place = laid(table)
    assert wire.table_in(memory, place) == table
    assert len(wire.encode(wire.Snapshot(2**40, 2**40, place, 2**40, 0.1))) < 300


@pytest.mark.parametrize("place", [(-1, 5), (0, -1), (0, 10**9), (2**70, 1), (30, 5), (0, 3)])
def test_a_table_that_is_not_there(place: tuple[int, int]) -> None:
    """A place out of the memory, or of something else, is an error of the protocol."""
    memory, _ = laid(wire.Table(FILES, []))
    with pytest.raises(ProtocolError, match="a snapshot"):
        wire.table_in(memory, wire.Place(*place))


@pytest.mark.parametrize("memory", [b"", b"\xff" * 99, b"[" * 99, b'{"files":[],"outputs":[1]}'])
def test_no_table(memory: bytes) -> None:
    """The same for bytes that are no table."""
    with pytest.raises(ProtocolError, match="table can't be read"):
        wire.table_in(memoryview(memory), wire.Place(0, len(memory)))


@pytest.mark.parametrize(
    "file", [wire.Extent("a", -1, 3), wire.Extent("a", 0, 10**9), wire.Extent("state.json", 0, 1)]
)
def test_a_table_that_lies(file: wire.Extent) -> None:
    """A file out of the memory, or two of one name."""
    memory, place = laid(wire.Table([*FILES, file], []))
    with pytest.raises(ProtocolError, match=r"said to be|one name"):
        wire.table_in(memory, place)


@pytest.mark.parametrize("text", ["x" * 10**6, "\0" * 10**6, "é" * 10**6])
def test_a_long_text(text: str) -> None:
    """What is said to a person is cut to what fits into a packet, and said."""
    for message in (wire.Said(text), wire.Refused("MismatchError", text)):
        packet = wire.encode(message)
        assert len(packet) <= wire.MESSAGE_BYTES_MAX
        said = wire.decode_for_supervisor(packet)
        assert isinstance(said, wire.Said | wire.Refused)
        assert text.startswith(said.text.removesuffix(" …"))
        assert len(said.text) > 1000
