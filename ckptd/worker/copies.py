"""The one copy that a snapshot is: tensors' bits into an arena, as fast as memory is.

Rules:

1. Bits move as bits: nothing is converted on the way, and no arithmetic sees them.
2. The smallest tensors are copied at once. The others are cut into pieces, and shared out among
   several threads. PyTorch's own threads are not used for it: their number decides about bits, and
   a barrier for each of thousands of tensors costs more than the copy.
3. From a GPU everything runs on a stream of its own, what makes the bits plain included, behind
   what the script has asked for so far, and into memory that was pinned for it.
4. However it ends, nothing is on its way any more afterwards: the arena may be given back, and the
   tensors may be freed or changed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, Self

import torch

from ckptd.worker import tree
from ckptd.worker.arena import Arena

_PIECE: Final = 8 << 20
_SHARED_FROM: Final = 32 << 10
_THREADS_MAX: Final = 4

#: Source, target and length of bytes; the interpreter's lock is let go of meanwhile.
_move: Final[Callable[[int, int, int], object]] = ctypes.memmove

#: One for each GPU for good: torch keeps the memory that it used on a stream for that stream.
_side_streams: Final[dict[torch.device, torch.cuda.Stream]] = {}


class Copies:
    """Copies into one arena, within a `with`; all are done when it is left."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._shares: list[list[tuple[int, int, int]]] = []  # of about a piece's length each
        self._room = 0  # in the last share
        self._kept: list[torch.Tensor] = []  # until they are copied
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # Where no GPU is used, nothing of what is in memory is still to come.
        self._arrived = not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._move_shares()
                for stream in self._streams.values():
                    stream.synchronize()
            else:
                for stream in self._streams.values():
                    with suppress(RuntimeError):  # there is an error already
                        stream.synchronize()
        finally:
            self._shares.clear()
            self._kept.clear()

    def add(self, offset: int, tensor: torch.Tensor) -> None:
        """Copy a tensor's elements, in the order of a contiguous one, to an offset of the arena."""
        if tensor.is_cuda:
            self._add_from_gpu(offset, tensor)
            return
        if not self._arrived and tensor.is_cpu and tensor.is_pinned():
            _wait_for_script()
            self._arrived = True
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            bits = tree.as_bits(tensor)
            self._place(offset, bits).copy_(bits)
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

    def _move_shares(self) -> None:
        threads = min(_THREADS_MAX, len(os.sched_getaffinity(0)), len(self._shares))
        if threads > 1:
            with ThreadPoolExecutor(threads, "ckptd-copy") as pool:
                list(pool.map(_move_all, self._shares))
        else:
            for share in self._shares:
                _move_all(share)

    def _add_from_gpu(self, offset: int, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = _side_stream(tensor.device)
            # What computes the state on the script's stream comes first. Nothing is added there
            # until this is done: the script waits.
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            _pin(self._arena, tensor.device)
            # On this stream too: a conjugate or a negative is computed, and its memory is this
            # stream's. The script's own is not given back while it is kept.
            self._kept.append(tensor)
            bits = tree.as_bits(tensor)
            self._kept.append(bits)
            self._place(offset, bits).copy_(bits, non_blocking=True)

    def _place(self, offset: int, bits: torch.Tensor) -> torch.Tensor:
        """The arena's bytes at an offset as a tensor like `bits`."""
        if not bits.numel():
            return torch.empty(bits.shape, dtype=bits.dtype)
        found = torch.frombuffer(
            self._arena.mapping, dtype=bits.dtype, count=bits.numel(), offset=offset
        )
        return found.view(bits.shape)


def _move_all(share: list[tuple[int, int, int]]) -> None:
    for piece in share:
        _move(*piece)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    stream = _side_streams.get(device)
    if stream is None:
        stream = _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _wait_for_script() -> None:
    """Until what the script has asked its GPUs for is there.

    A tensor in pinned memory may be the target of a copy (`non_blocking=True`) that is under way.
    """
    for index in range(torch.cuda.device_count()):
        # No context is made on a GPU that is not used: that would take memory there.
        if index == torch.cuda.current_device() or torch.cuda.memory_reserved(index):
            torch.cuda.current_stream(index).synchronize()


def _pin(arena: Arena, device: torch.device) -> None:
    """Register an arena with the driver, once: copies into it then run beside everything else.

    Where the driver refuses (a limit on locked memory), the same copies only take longer.
    """
    if arena.unpin is not None:
        return
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = arena.address
    if int(runtime.cudaHostRegister(address, arena.length, 0)):
        arena.unpin = lambda: None
        # The runtime remembers its last error until someone asks, and torch asks after each kernel
        # that it launches: the next one of the training would be blamed. This one takes it off.
        with suppress(RuntimeError):
            torch.ones(1, device=device)
        return

    def unpin() -> None:
        with torch.cuda.device(device):  # this may be a thread that has no GPU of its own yet
            runtime.cudaHostUnregister(address)

    arena.unpin = unpin
