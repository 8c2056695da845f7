"""Everything that happened to a run, append-only: one JSON object a line.

Each has `t` (seconds since 1970, a label), `event`, and the event's own fields. A line that a crash
tore is passed over when reading. The journal explains; what is true is read from the checkpoints,
and a journal that can't be written never ends a job.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec


class Journal:
    """A run's journal, for writing.

    Args:
        path: the file; created when missing.
        wall_s: the time of day.
        say: tells a person, once, that the journal can't be written.
    """

    def __init__(self, path: Path, wall_s: Callable[[], float], say: Callable[[str], None]) -> None:
        self._path = path
        self._wall_s = wall_s
        self._say = say
        self._failed = False
        self._torn = _ends_torn(path)

    def line(self, event: str, fields: dict[str, Any]) -> bytes:
        """An event that happens now, as it is written."""
        return msgspec.json.encode({"t": round(self._wall_s(), 3), "event": event, **fields})

    def append(self, line: bytes) -> None:
        """Append a line and sync it."""
        try:
            with self._path.open("ab", buffering=0) as journal:
                rest = memoryview((b"\n" if self._torn else b"") + line + b"\n")
                self._torn = True  # until all of it is written: a full disk may take half of it
                while rest:
                    rest = rest[journal.write(rest) :]
                self._torn = False
                os.fsync(journal.fileno())
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"the journal {self._path} can't be written: {error.strerror}")


def read(path: Path, from_byte: int = 0) -> list[dict[str, Any]]:
    """All events, oldest first; a torn line is passed over. None where there is no journal."""
    try:
        with path.open("rb") as journal:
            journal.seek(from_byte)
            lines = journal.read().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.DecodeError:
            continue  # torn by a crash: what it said is lost, and nothing depends on it
    return events


def _ends_torn(path: Path) -> bool:
    try:
        with path.open("rb") as journal:
            if journal.seek(0, os.SEEK_END) == 0:
                return False
            journal.seek(-1, os.SEEK_END)
            return journal.read(1) != b"\n"
    except FileNotFoundError:
        return False
