"""The states of `random` and `numpy.random`, read from memory in a microsecond.

A loader worker sends its random states with every batch. Asking for them costs 20 µs for `random`
(a tuple of 625 integers is made) and 40 µs for `numpy.random` (an array is filled number by
number), more than everything else that ckptd does for a batch; and the words are just lying there.

Rule: an offset is never assumed. It is searched for, in a generator made for the purpose, with the
state that the public way gives; then the two ways are compared over draws, cached normal values and
seeds. Where they don't agree (another Python, another numpy), the public way is used.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from array import array
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

_WORDS: Final = 624
_WORDS_BYTES: Final = 4 * _WORDS
#: numpy keeps `int has_gauss; double gauss`, aligned; the double is searched for.
_GAUSS_BEFORE: Final = 8
#: Over the end of the words, so that they are made anew in between; odd, so that a cached normal
#: value is there and is not.
_PROBE_DRAWS: Final = _WORDS + 30
_PROBE_EVERY: Final = 31


def pack_python(state: Any) -> bytes:
    """`random.getstate()` as bytes: version, 624 words, position, and the cached normal value."""
    version, words, gauss = state
    return array("I", [version, *words]).tobytes() + _pack_float(gauss)


def unpack_python(packed: bytes) -> Any:
    """What `pack_python` was given."""
    words = array("I", packed[: _WORDS_BYTES + 8]).tolist()
    rest = packed[_WORDS_BYTES + 8 :]
    return (words[0], tuple(words[1:]), array("d", rest)[0] if rest else None)


#: How long what `pack_numpy` gives is; what another kind of generator has is shorter.
NUMPY_BYTES: Final = _WORDS_BYTES + struct.calcsize("=iid")


def pack_numpy(state: Any) -> bytes:
    """`numpy.random.get_state()` as bytes: 624 words, position, and the cached normal value."""
    _, key, position, has_gauss, gauss = state
    numbers = struct.pack("=iid", position, has_gauss, gauss if has_gauss else 0.0)
    return bytes(key.tobytes()) + numbers


def unpack_numpy(packed: bytes) -> Any:
    """What `pack_numpy` was given."""
    key = np.frombuffer(packed[:_WORDS_BYTES], dtype=np.uint32)
    return ("MT19937", key, *struct.unpack("=iid", packed[_WORDS_BYTES:]))


def _pack_float(value: float | None) -> bytes:
    return b"" if value is None else array("d", [value]).tobytes()


def python_reader() -> Callable[[], bytes]:
    """A function that gives `pack_python(random.getstate())`, quickly if that is possible here."""
    instance: Any = getattr(random.random, "__self__", None)  # the functions are its methods
    offset = _python_offset() if type(instance) is random.Random else None
    if offset is None:
        return lambda: pack_python(random.getstate())
    return lambda: _peek_python(instance, offset)


class NumpyReader:
    """Gives `pack_numpy(numpy.random.get_state())`, quickly if that is possible here.

    Args:
        other: packs the state where the global stream is no Mersenne twister.
    """

    def __init__(self, other: Callable[[], bytes]) -> None:
        self._other = other
        self._instance: Any = np.random.mtrand._rand  # noqa: SLF001  # the functions are its methods
        self._bits: Any = None
        self._address = 0
        self._offset: int | None = None

    def __call__(self) -> bytes:
        """The state now."""
        # Held and compared: `numpy.random.set_bit_generator` replaces it, and frees the old one.
        bits = self._instance._bit_generator  # noqa: SLF001  # the public getter is slower
        if bits is not self._bits:
            self._bits = bits
            is_twister = type(bits) is np.random.MT19937
            self._offset = _numpy_offset() if is_twister else None
            self._address = bits.ctypes.state_address if is_twister else 0
        if self._offset is not None:
            return _peek_numpy(self._instance, self._address, self._offset)
        if type(bits) is np.random.MT19937:
            return pack_numpy(np.random.get_state())  # the global stream
        return self._other()


# ------------------------------------------------------------------ where things lie


def _peek_python(instance: Any, offset: int) -> bytes:
    memory = ctypes.string_at(id(instance) + offset, 4 + _WORDS_BYTES)
    version = random.Random.VERSION.to_bytes(4, sys.byteorder)
    return version + memory[4:] + memory[:4] + _pack_float(instance.gauss_next)


def _peek_numpy(instance: Any, address: int, offset: int) -> bytes:
    words = ctypes.string_at(address, _WORDS_BYTES + 4)
    has_gauss, gauss = struct.unpack("=i4xd", ctypes.string_at(id(instance) + offset, 16))
    return words + struct.pack("=id", has_gauss, gauss if has_gauss else 0.0)


@cache
def _python_offset() -> int | None:
    """Where in a `random.Random` its position lies, which is followed by its words."""
    probe = random.Random(20)  # noqa: S311  # its state is known, that is all
    _, words, _ = probe.getstate()
    image = ctypes.string_at(id(probe), random.Random.__basicsize__)
    offset = image.find(array("I", [words[-1], *words[:-1]]).tobytes())
    if offset < 0:
        return None
    for draw in (probe.random, lambda: probe.gauss(0, 1), lambda: probe.seed(7)):
        for number in range(_PROBE_DRAWS):
            draw()
            if number % _PROBE_EVERY:
                continue
            if _peek_python(probe, offset) != pack_python(probe.getstate()):
                return None
    return offset


@cache
def _numpy_offset() -> int | None:
    """Where in a `numpy.random.RandomState` it is said whether a normal value is cached."""
    probe: Any = np.random.RandomState(20)  # its state is known, that is all
    probe.standard_normal()  # makes two, and keeps the second
    gauss = probe.get_state(legacy=False)["gauss"]
    image = ctypes.string_at(id(probe), np.random.RandomState.__basicsize__)
    offset = image.find(struct.pack("=d", gauss)) - _GAUSS_BEFORE
    if offset < 0:
        return None
    address = probe._bit_generator.ctypes.state_address  # noqa: SLF001
    for draw in (probe.random_sample, probe.standard_normal, lambda: probe.seed(7)):
        for number in range(_PROBE_DRAWS):
            draw()
            if number % _PROBE_EVERY:
                continue
            if _peek_numpy(probe, address, offset) != pack_numpy(probe.get_state()):
                return None
    return offset
