"""Where in the user's code a call came from."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

_OURS: Final = str(Path(__file__).parents[1]) + os.sep
#: Code that is not the user's: its frames are passed over.
_FOREIGN: Final = (
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    _OURS,
)


def frames() -> Iterator[types.FrameType]:
    """The user's frames on this thread's stack, innermost first."""
    frame: types.FrameType | None = sys._getframe()  # noqa: SLF001  # `inspect` would read source files
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def is_users(file: str) -> bool:
    """Whether a file is the user's own code: no library's, no part of Python, none of ours."""
    return not file.startswith(("<", *_FOREIGN))


def where() -> str:
    """The line outside ckptd that called: "train.py:31"."""
    frame = sys._getframe()  # noqa: SLF001  # `inspect` would read source files
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def is_call_of(name: str) -> bool:
    """Whether the expression that the user's code is evaluating is `name(…)`."""
    frame = next(frames(), None)
    if frame is None:
        return False
    positions = islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
    line, _, column, _ = next(positions, (None, None, None, None))
    if line is None or column is None:
        return False
    text = linecache.getline(frame.f_code.co_filename, line).encode()[column:]
    return text.startswith(f"{name}(".encode())
