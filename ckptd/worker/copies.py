"""The one copy that a snapshot is: tensors' bits into an arena, as fast as memory is.

Rules:

1. Bits move as bits: nothing is converted on the way, and no arithmetic sees them.
2. The smallest tensors are copied at once. The others are cut into pieces, and shared out among
   several threads. PyTorch's own threads are not used for it: their number decides about bits, and
   a barrier for each of thousands of tensors costs more than the copy.
3. From a GPU the copies run on a stream of their own, into memory that was pinned for it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from ckptd.worker import tree
from ckptd.worker.arena import Arena

_PIECE: Final = 8 << 20
_SHARED_FROM: Final = 32 << 10
_THREADS_MAX: Final = 4

#: Source, target and length of bytes; the interpreter's lock is let go of meanwhile.
_move: Final[Callable[[int, int, int], object]] = ctypes.memmove


class Copies:
    """Copies into one arena; all are done when `finish` returns."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._shares: list[list[tuple[int, int, int]]] = []  # of about a piece's length each
        self._room = 0  # in the last share
        self._kept: list[torch.Tensor] = []  # until they are copied
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def add(self, offset: int, tensor: torch.Tensor) -> None:
        """Copy a tensor's elements, in the order of a contiguous one, to an offset of the arena."""
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            self._add_strided(offset, tensor)
            return
        length = tensor.nbytes
        source, target = tensor.data_ptr(), self._arena.address + offset
        if length < _SHARED_FROM:
            _move(target, source, length)
            return
        self._kept.append(tensor)
        for at in range(0, length, _PIECE):
            piece = min(_PIECE, length - at)
            if self._room <= 0:
                self._shares.append([])
                self._room = _PIECE
            self._shares[-1].append((target + at, source + at, piece))
            self._room -= piece

    def finish(self) -> None:
        """Wait until everything is there."""
        threads = min(_THREADS_MAX, len(os.sched_getaffinity(0)), len(self._shares))
        if threads > 1:
            with ThreadPoolExecutor(threads, "ckptd-copy") as pool:
                list(pool.map(_move_all, self._shares))
        else:
            for share in self._shares:
                _move_all(share)
        for stream in self._streams.values():
            stream.synchronize()
        self._shares.clear()
        self._kept.clear()

    def _add_strided(self, offset: int, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        bits = tree.as_bits(tensor)
        place = torch.frombuffer(
            self._arena.mapping, dtype=bits.dtype, count=bits.numel(), offset=offset
        ).view(bits.shape)
        if not bits.is_cuda:
            place.copy_(bits)
            return
        _pin(self._arena)
        stream = self._streams.get(bits.device)
        if stream is None:
            stream = self._streams[bits.device] = torch.cuda.Stream(bits.device)  # type: ignore[no-untyped-call]
            # What computes the state on the script's stream comes first.
            stream.wait_stream(torch.cuda.current_stream(bits.device))
        with torch.cuda.stream(stream):
            place.copy_(bits, non_blocking=True)
        self._kept.append(bits)


def _move_all(share: list[tuple[int, int, int]]) -> None:
    for piece in share:
        _move(*piece)


def _pin(arena: Arena) -> None:
    """Register an arena with the driver, once: copies into it then run beside everything else.

    Where the driver refuses (a limit on locked memory), the same copies only take longer.
    """
    if arena.unpin is None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = arena.address
        refused = int(runtime.cudaHostRegister(address, arena.length, 0))
        arena.unpin = (lambda: None) if refused else lambda: runtime.cudaHostUnregister(address)
