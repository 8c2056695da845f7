"""Switches of torch that decide about bits, and that a script may turn while it runs.

A resumed script turns them again only as far as its prologue goes; at the resume point they are set
to what they were. Each is set only where it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import torch

from ckptd.worker.tree import Json

#: Too small for a normal float64: what becomes of it tells whether such numbers are flushed.
_DENORMAL: Final = 1e-310


def capture() -> dict[str, Json]:
    """Every setting by its name; those that this version of torch can't tell are left out."""
    found: dict[str, Json] = {}
    for name, (get, _) in _SETTINGS.items():
        with suppress(RuntimeError, AttributeError):
            found[name] = get()
    return found


def restore(saved: dict[str, Json]) -> None:
    """Set what `capture` gave."""
    now = capture()
    for name, value in saved.items():
        if name in now and now[name] != value:
            _SETTINGS[name][1](value)


def _flushes_denormals() -> bool:
    return bool((torch.tensor(_DENORMAL, dtype=torch.float64) * 1).item() == 0)


def _set_default_dtype(name: str) -> None:
    torch.set_default_dtype(getattr(torch, name))


def _set_deterministic(mode: int) -> None:
    torch.set_deterministic_debug_mode(mode)


def _flag(owner: Any, name: str) -> tuple[Callable[[], Json], Callable[[Json], object]]:
    """An attribute that is read and written as it is."""
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


_cuda: Final = torch.backends.cuda
_SETTINGS: Final[dict[str, tuple[Callable[[], Json], Callable[[Any], object]]]] = {
    "default dtype": (
        lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        _set_default_dtype,
    ),
    "flush denormal": (_flushes_denormals, torch.set_flush_denormal),
    # 0: off, 1: deterministic, with a warning where that is impossible, 2: with an error
    "deterministic algorithms": (torch.get_deterministic_debug_mode, _set_deterministic),
    "float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "mkldnn": _flag(torch.backends.mkldnn, "enabled"),
    "cuDNN": _flag(torch.backends.cudnn, "enabled"),
    "cuDNN benchmark": _flag(torch.backends.cudnn, "benchmark"),
    "cuDNN deterministic": _flag(torch.backends.cudnn, "deterministic"),
    "cuDNN TF32": _flag(torch.backends.cudnn, "allow_tf32"),
    "CUDA TF32": _flag(_cuda.matmul, "allow_tf32"),
    "CUDA reduced fp16": _flag(_cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    "CUDA reduced bf16": _flag(_cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    "flash attention": (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    "efficient attention": (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    "plain attention": (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
}
