"""How tensors lie in a safetensors file: its header, and where each tensor's bytes begin.

The format (safetensors, "Format"): eight bytes with the header's length, the header (JSON, padded
with spaces), then the tensors' bytes without gaps. Here the header is padded so that the first
tensor begins at a multiple of 64 bytes, and tensors are laid out by falling element size, so that
each begins at a multiple of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

_ALIGNMENT: Final = 64
#: A tensor of this name would take the place of the header's strings.
_METADATA: Final = "__metadata__"
#: The width of the header's length, the first thing in a file.
LENGTH_BYTES: Final = 8

#: Bytes of one element, by safetensors' name of its type.
ELEMENT_BYTES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor: its name, safetensors' name of its type, its shape, its length in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


class Image(msgspec.Struct, frozen=True):
    """A file's layout.

    Attributes:
        header: the first bytes of the file.
        offsets: where each tensor begins in the file, in the order in which they were given.
        length: of the whole file, in bytes.
    """

    header: bytes
    offsets: list[int]
    length: int


def layout(tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> Image:
    """Lay out a file.

    Args:
        tensors: with names that differ.
        metadata: strings for the header's `__metadata__`.

    Raises:
        ValueError: two tensors of one name, a tensor called `__metadata__`, or a length that is
            not that of the shape.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors of one name in one file")
    order = sorted(range(len(tensors)), key=lambda i: -ELEMENT_BYTES[tensors[i].dtype])
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    begins = [0] * len(tensors)
    end = 0
    for i in order:
        tensor = tensors[i]
        _check(tensor)
        begins[i], end = end, end + tensor.length
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begins[i], end],
        }
    text = msgspec.json.encode(header)
    text += b" " * (-(len(text) + LENGTH_BYTES) % _ALIGNMENT)
    start = LENGTH_BYTES + len(text)
    return Image(
        len(text).to_bytes(LENGTH_BYTES, "little") + text,
        [start + begin for begin in begins],
        start + end,
    )


class Place(msgspec.Struct, frozen=True):
    """A tensor in a file: safetensors' name of its type, its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def parse(content: memoryview) -> dict[str, Place]:
    """The tensors in a file, by name.

    Raises:
        ValueError: it is no safetensors file; says what was found.
    """
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    start = LENGTH_BYTES + length
    if len(content) < start:
        raise ValueError(f"a header of {length} bytes in a file of {len(content)}")
    try:
        header = msgspec.json.decode(content[LENGTH_BYTES:start], type=dict[str, msgspec.Raw])
        header.pop(_METADATA, None)
        entries = {n: msgspec.json.decode(raw, type=_Entry) for n, raw in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header can't be read: {error}") from error
    places = {}
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in ELEMENT_BYTES or min((begin, *entry.shape)) < 0:
            raise ValueError(f"{name}: {entry.dtype} {list(entry.shape)} is not known")
        if end > len(content) - start:
            raise ValueError(f"{name}: its bytes end at {start + end}, the file at {len(content)}")
        _check(TensorSpec(name, entry.dtype, entry.shape, end - begin))
        places[name] = Place(entry.dtype, entry.shape, start + begin, start + end)
    return places


def _check(tensor: TensorSpec) -> None:
    if tensor.name == _METADATA:
        raise ValueError(f"a tensor can't be called {_METADATA}: the format keeps that name")
    elements = 1
    for n in tensor.shape:
        elements *= n
    if elements * ELEMENT_BYTES[tensor.dtype] != tensor.length:
        raise ValueError(
            f"{tensor.name}: {tensor.dtype} {list(tensor.shape)} is not {tensor.length} bytes long"
        )
