"""The random streams as a replayed iterable found them.

An iterable without a position is made again and its first k items are dropped. That is exact only
if each item finds the process's random streams as it found them the first time, and between two
items the script has drawn from the same streams. What it drew depends on everything that is not
run again, so the streams themselves are kept: a *tape* holds, for each item that drew from a stream
which the script had moved since, that stream's state.

For an iterable that draws nothing, or whose script draws nothing, the tape stays empty. A state is
kept as its difference to the one before it, compressed: while a Mersenne twister moves within one
block of 624 words that is a few bytes, else some 2,500.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from ckptd.worker import rng

_ENTRY: Final = struct.Struct("<QBII")  # item, stream, length of the state, bytes that follow
_FIRST_BYTES: Final = 1 << 12


class Tape:
    """What an iterable's items found.

    Args:
        bytes_max: beyond this the tape is given up.
        say: tells a person that it was.
    """

    def __init__(self, bytes_max: int, say: Callable[[str], None]) -> None:
        self._bytes_max = bytes_max
        self._say = say
        # Written at its end only, so that a view of its begin can be handed out without a copy.
        self._written = np.zeros(_FIRST_BYTES, dtype=np.uint8)
        self._length = 0
        self._last = [b"", b"", b""]
        self.full = False

    def record(self, iterator: Iterator[Any], item: int = 0) -> Iterator[Any]:
        """The iterator's items; `item` is the first one's number."""
        packer = rng.Packer()
        packer.changed()
        return self._recorded(iterator, item, packer)

    def _recorded(self, iterator: Iterator[Any], item: int, packer: rng.Packer) -> Iterator[Any]:
        moved: list[bytes | None] = [None, None, None]
        while not self.full:
            for stream, state in enumerate(packer.changed()):
                moved[stream] = moved[stream] if state is None else state
            try:
                value = next(iterator)
            except StopIteration:
                return
            for stream, state in enumerate(packer.changed()):
                found = moved[stream]
                if state is not None and found is not None:
                    self._add(item, stream, found)
                    moved[stream] = None
            yield value
            item += 1
        yield from iterator

    def _add(self, item: int, stream: int, state: bytes) -> None:
        packed = zlib.compress(_difference(state, self._last[stream]), 1)
        entry = _ENTRY.pack(item, stream, len(state), len(packed)) + packed
        end = self._length + len(entry)
        if end > self._bytes_max:
            self.full = True
            self._say(
                "an iterable without `state_dict` and the script draw from the same random "
                f"streams in turn, and after {item} items this is too much to keep: from here to "
                "the end of its loop, an interrupted job will not continue exactly. Use loader "
                "workers, or give the iterable a generator of its own"
            )
            return
        if end > len(self._written):
            grown = np.zeros(2 * end, dtype=np.uint8)
            grown[: self._length] = self._written[: self._length]
            self._written = grown
        self._written[self._length : end] = np.frombuffer(entry, dtype=np.uint8)
        self._length = end
        self._last[stream] = state

    def position(self) -> dict[str, Any]:
        """As plain values for a checkpoint."""
        return {"written": self._written[: self._length], "full": self.full}

    def replay(self, position: dict[str, Any]) -> Iterator[None]:
        """Take over what `position` gave; each `next` sets the streams for one item more."""
        written = bytes(np.asarray(position["written"], dtype=np.uint8))
        self._written = np.frombuffer(written, dtype=np.uint8).copy()
        self._length = len(written)
        self.full = bool(position["full"])
        if self.full:
            self._say(
                "the job was interrupted in an iterable that draws from the same random streams "
                "as the script, after more items than could be kept: it does not continue exactly"
            )
        return self._set(written)

    def _set(self, written: bytes) -> Iterator[None]:
        entries = self._entries(written)
        entry = next(entries, None)
        packer, now = rng.Packer(), [b"", b"", b""]
        item = 0
        while True:
            if entry is not None and entry[0] == item:
                for stream, state in enumerate(packer.changed()):
                    now[stream] = now[stream] if state is None else state
                while entry is not None and entry[0] == item:
                    now[entry[1]] = entry[2]
                    entry = next(entries, None)
                python, numpy, torch = now
                rng.restore_packed((python, numpy, torch))
            yield
            item += 1

    def _entries(self, written: bytes) -> Iterator[tuple[int, int, bytes]]:
        at = 0
        while at < len(written):
            item, stream, length, packed = _ENTRY.unpack_from(written, at)
            at += _ENTRY.size
            difference = zlib.decompress(written[at : at + packed])
            at += packed
            state = _difference(difference, self._last[stream])[:length]
            self._last[stream] = state
            yield item, stream, state


def _difference(state: bytes, other: bytes) -> bytes:
    """Each byte of a state combined with the other's by exclusive or; its own inverse."""
    length = max(len(state), len(other))
    a = np.frombuffer(state.ljust(length, b"\0"), dtype=np.uint8)
    b = np.frombuffer(other.ljust(length, b"\0"), dtype=np.uint8)
    return bytes(np.bitwise_xor(a, b))
