"""Any value as a short text by which two runs are compared bit for bit, for a drill.

A short plain value is its own digest, so that a report can show it; everything else is a hash over
all its bits. Unlike a checkpoint, a digest may leave out what it can't read: a value of an unknown
type counts by its type and its attributes.
"""

from __future__ import annotations

import struct
import types
from collections import deque
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

import msgspec
import numpy as np
import torch
import xxhash

from ckptd.worker import rng, tree
from ckptd.worker.state import Parts

_SHOWN_MAX: Final = 60
_DEPTH_MAX: Final = 8
#: Of longer containers the first and the last items count: hashing a list of a million file names
#: at every step would take longer than the training.
_ITEMS_MAX: Final = 20_000
_CODE: Final = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))


def digest(value: Any) -> str:
    """A value's digest."""
    if type(value) in _PLAIN or _is_short_nest(value):
        text = repr(value)
        if len(text) <= _SHOWN_MAX:
            return text
    digester = _Digester()
    digester.update(value, 0)
    return _hash_text(digester.hasher)


def digest_parts(parts: Parts) -> dict[str, str]:
    """The digest of each part of a captured object."""
    found = {}
    for name, frozen in parts.items():
        hasher = xxhash.xxh3_128(msgspec.json.encode(frozen.tree))
        for key, tensor in frozen.tensors:
            hasher.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            hasher.update(_bytes_of(tensor))
        found[name] = _hash_text(hasher)
    return found


def shown(text: str) -> str | None:
    """The value itself, where a digest is one; None where it is a hash."""
    return None if text.startswith("#") else text


def _is_short_nest(value: Any) -> bool:
    return (
        type(value) in (tuple, list, dict, set)
        and len(value) <= 8
        and all(type(one) in _PLAIN for one in value)
        and (type(value) is not dict or all(type(one) in _PLAIN for one in value.values()))
        and type(value) is not set  # its order is not its own
    )


class _Digester:
    def __init__(self) -> None:
        self.hasher = xxhash.xxh3_128()
        self._seen: dict[int, object] = {}  # keeps ids from being used again while we run

    def update(self, value: Any, depth: int) -> None:  # one line a type
        hasher = self.hasher
        hasher.update(type(value).__qualname__.encode())
        if value is None or isinstance(value, bool | int | complex):
            hasher.update(repr(value).encode())
        elif isinstance(value, float):
            hasher.update(struct.pack("<d", value))
        elif isinstance(value, str | PurePath | torch.dtype | torch.device | range):
            hasher.update(str(value).encode("utf-8", "surrogatepass"))
        elif isinstance(value, bytes | bytearray):
            hasher.update(value)
        elif isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype} {list(value.shape)}".encode())
            hasher.update(_bytes_of(value))
        elif isinstance(value, np.ndarray | np.generic):
            self._update_array(np.asarray(value), depth)
        elif rng.is_generator(value):
            hasher.update(msgspec.json.encode(rng.capture(value)))
        elif depth < _DEPTH_MAX and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._update_container(value, depth + 1)

    def _update_array(self, value: np.ndarray[Any, Any], depth: int) -> None:
        self.hasher.update(f"{value.dtype.str} {value.shape}".encode())
        if value.dtype.hasobject:
            self.update(value.ravel().tolist(), depth)
        else:
            self.hasher.update(np.ascontiguousarray(value).tobytes())

    def _update_container(self, value: Any, depth: int) -> None:
        if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
            self.update(value.state_dict(), depth)
        elif isinstance(value, Mapping):
            for key, item in _ends(list(value.items())):
                self.update(key, depth)
                self.update(item, depth)
        elif isinstance(value, list | tuple | deque):
            self.hasher.update(str(len(value)).encode())
            for item in _ends(list(value)):
                self.update(item, depth)
        elif isinstance(value, set | frozenset):
            for one in sorted(digest(item) for item in value):  # the order is no part of a set
                self.hasher.update(one.encode())
        elif not isinstance(value, _CODE):
            for name, item in sorted(getattr(value, "__dict__", {}).items()):
                self.hasher.update(name.encode())
                self.update(item, depth)


def _hash_text(hasher: xxhash.xxh3_128) -> str:
    return f"#{hasher.hexdigest()[:16]}"


def _ends(items: list[Any]) -> list[Any]:
    half = _ITEMS_MAX // 2
    return items if len(items) <= _ITEMS_MAX else items[:half] + items[-half:]


def _bytes_of(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_sparse:
        tensor = tensor.coalesce().to_dense()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.device.type == "meta":
        return b""
    return tree.as_bits(tensor).cpu().contiguous().reshape(-1).numpy().view(np.uint8).data
