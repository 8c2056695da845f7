"""The names of checkpoints, and which of them to drop.

A checkpoint is called by its step, "000001200". Where a job stopped twice at one step in different
places (the end of an epoch, the begin of the next), the second one is "000001200.1": newer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

_DIGITS: Final = 9
_NAME: Final = re.compile(r"(\d{9,18})(?:\.([1-9]\d{0,5}))?")

#: Directories that are being written, or being deleted: never read.
TEMPORARY: Final = ".tmp-"
DROPPED: Final = ".drop-"
#: Put after a name: kept for a person, never read.
DAMAGED: Final = ".damaged"
SUPERSEDED: Final = ".superseded"


def order_of(name: str) -> tuple[int, int] | None:
    """(step, repetition) of a checkpoint's name; None: it is not one."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def newest_first(names: Iterable[str]) -> list[str]:
    """The names that are checkpoints', newest first."""
    ordered = [(order, name) for name in names if (order := order_of(name)) is not None]
    return [name for _, name in sorted(ordered, reverse=True)]


def split(name: str, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The checkpoints that are newer than one of this name, and the older; each newest first."""
    ordered = newest_first({*names, name})
    at = ordered.index(name)
    return ordered[:at], ordered[at + 1 :]


def name_for(step: int, existing: Iterable[str]) -> str:
    """The name of a new checkpoint of a step."""
    orders = [order_of(name) for name in existing]
    taken = [order[1] for order in orders if order is not None and order[0] == step]
    plain = f"{step:0{_DIGITS}d}"
    return f"{plain}.{max(taken) + 1}" if taken else plain


def to_drop(names: Sequence[str], keep: int) -> list[str]:
    """The checkpoints to drop so that the `keep` newest stay (at least one), oldest first."""
    return newest_first(names)[max(keep, 1) :][::-1]
