"""Where in the user's code a call came from."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from functools import cache
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


def is_users_module(name: str) -> bool:
    """Whether a module that was imported is the user's own code."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and is_users(str(Path(file).absolute()))


def where() -> str:
    """The line outside ckptd that called: "train.py:31"."""
    frame = sys._getframe()  # noqa: SLF001  # `inspect` would read source files
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def is_call_of(name: str) -> bool:
    """Whether the expression that the user's code is evaluating is `name(…)`."""
    frame = next(frames(), None)
    return frame is not None and _text_at(frame.f_code, frame.f_lasti).startswith(f"{name}(")


@cache
def _text_at(code: types.CodeType, offset: int) -> str:
    """The rest of the source line from where the instruction's expression begins."""
    positions = islice(code.co_positions(), offset // 2, None)
    line, _, column, _ = next(positions, (None, None, None, None))
    if line is None or column is None:
        return ""
    return linecache.getline(code.co_filename, line).encode()[column:].decode(errors="replace")
