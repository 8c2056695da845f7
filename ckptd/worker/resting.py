"""Which parameters rest: they lie in a file of their own, which need not be written again.

Only where a tensor lies is decided here. Whether a file is written is the store's affair, which
compares sums: a wrong guess costs a write and nothing else. So looking must cost next to nothing.

Rules:

1. A parameter moves when, at a snapshot, its memory or its version (torch counts the changes in
   place) is not that of the first snapshot, or when a sample of its bits is not that of the one
   before: an average that is kept through `.data` has no versions. A few samples that agree are
   enough. Once it was seen to move it counts as moving: where tensors lie changes only as
   parameters begin to move.
2. What has `requires_grad=False` rests from the first snapshot on. Only its bits count: swapping an
   average's weights in and out makes versions, also of what stays the same. It may also come to
   rest later, when it is turned off, but only once: a GAN turns its halves off in turn.
3. What could be trained rests when it stood still while other parameters moved. Before the first
   step nothing moves, and an ordinary model has one file.
4. What rested in the checkpoint that a job was resumed from still does: it is not written anew
   because the process is new.
5. Where everything in a module rests there is nothing to keep apart. Buffers do not count: plain
   weights are expected to be in one file with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

_SAMPLES: Final = 4


class _Module:
    """What was seen of one module's parameters, by key."""

    def __init__(self, resting: Iterable[str] = (), others: Iterable[str] = ()) -> None:
        self.resting = set(resting)
        self.others = set(others)  # in the checkpoint, beside those
        self.first: dict[str, tuple[int, int]] = {}
        self.trained: set[str] = set()  # when first seen, and not turned off since
        self.moving: set[str] = set()
        self.samples: dict[str, tuple[bytes, int]] = {}  # and how many there were
        self.watched: list[str] = []

    def turned_off(self, key: str) -> None:
        """It moved while it was trained, and is not trained any more."""
        self.moving.remove(key)
        self.trained.remove(key)
        self.first.pop(key, None)
        self.samples.pop(key, None)


class Resting:
    """The parameters of a job's modules."""

    def __init__(self) -> None:
        self._modules: dict[str, _Module] = {}
        self._any_moved = False

    def expect(self, module: str, resting: Iterable[str], others: Iterable[str]) -> None:
        """What the checkpoint kept apart of a module, and what it did not."""
        self._modules[module] = _Module(resting, others)

    def among(self, module: str, tensors: list[tuple[str, torch.Tensor]]) -> set[str]:
        """At a snapshot: the keys of a module's parameters that are to be kept apart."""
        seen = self._modules.setdefault(module, _Module())
        was, moving, still = seen.resting, seen.moving, []
        for key, tensor in tensors:
            if not isinstance(tensor, torch.nn.Parameter) and key not in was:
                continue
            if key in moving:
                if tensor.requires_grad or key not in seen.trained:
                    continue
                seen.turned_off(key)
            is_new = key not in seen.first
            if self._moves_now(seen, key, tensor):
                continue
            still.append((key, key in was or not tensor.requires_grad, is_new))
        seen.watched = [key for key, _, _ in still if self._is_open(seen, key)]
        resting = {key for key, rests, is_new in still if rests or (self._any_moved and not is_new)}
        if len(resting) < len(tensors):
            seen.resting = resting
        else:
            was &= resting
        return seen.resting

    def _moves_now(self, seen: _Module, key: str, tensor: torch.Tensor) -> bool:
        now = tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
        first = seen.first.get(key)
        if first is None:
            seen.first[key] = now
            if tensor.requires_grad:
                seen.trained.add(key)
                return False
            if key not in seen.others:
                return False
            # Not trained, and yet not kept apart by the checkpoint: the script itself changes it.
        elif first == now or not tensor.requires_grad:
            return False
        self._moves(seen, key)
        return True

    def _is_open(self, seen: _Module, key: str) -> bool:
        return self._any_moved and seen.samples.get(key, (b"", 0))[1] < _SAMPLES

    def watched(self, module: str) -> list[str]:
        """At that snapshot: the keys of its parameters of which a sample is wanted."""
        return self._modules[module].watched

    def copied(self, module: str, samples: dict[str, bytes]) -> None:
        """After it: a few of the bits of each of those."""
        seen = self._modules[module]
        for key, sample in samples.items():
            before, count = seen.samples.get(key, (sample, 0))
            seen.samples[key] = sample, count + 1
            if before != sample:
                self._moves(seen, key)

    def _moves(self, seen: _Module, key: str) -> None:
        seen.moving.add(key)
        self._any_moved = True
