"""Files that are rolled back with the checkpoint, so that no line is written twice.

A checkpoint records how long each file was. On resume the file is cut to that length when it is
opened (instead of being emptied by mode "w") and once more at the resume point, since the script's
prologue may have written to it again.

Before a checkpoint is published its outputs are synced. A file that is closed, and that a durable
checkpoint had synced as it still is, needs no other sync: a script may open one for each step.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ckptd.errors import MismatchError, UsageError

#: What changes when a file is written to: which one it is, its length, its time.
_Mark = tuple[int, int, int, int]


class Outputs:
    """The files that the script opened through `job.open`."""

    def __init__(self) -> None:
        self._files: dict[str, IO[Any]] = {}
        self._saved: dict[str, int] = {}
        self._closed: dict[str, _Mark] = {}  # as of the last `flush`
        self._synced: dict[str, _Mark] = {}  # as they were when they were synced
        self._sent: tuple[int, dict[str, _Mark]] | None = None

    def expect(self, lengths: dict[str, int]) -> None:
        """What the checkpoint says: bytes by absolute path."""
        self._saved = dict(lengths)

    def open(self, path: str | os.PathLike[str], mode: str, **options: Any) -> IO[Any]:
        """Open a file for writing; a real file object, line-buffered when it is text.

        Raises:
            UsageError: a mode that does not write.
            MismatchError: the file is shorter than the checkpoint says: lines that it counts on
                are lost.
        """
        if not set(mode) & set("wax"):
            raise UsageError(f"job.open({str(path)!r}, {mode!r}): only for files that are written")
        name = os.path.abspath(path)  # noqa: PTH100  # `resolve` would follow links
        saved = self._saved.get(name)
        if "b" not in mode:
            options.setdefault("buffering", 1)
        if saved is None:
            opened = open(path, mode, **options)  # noqa: PTH123, SIM115  # any kind of path; the user closes
        else:
            if not Path(name).exists() and saved == 0:
                Path(name).touch()
            _check_length(name, saved)
            # "r+" and not "a": appending would put the script's own seeks at the end
            opened = open(path, "r+" + "b" * ("b" in mode), **options)  # noqa: PTH123, SIM115
            opened.truncate(saved)
            opened.seek(0, os.SEEK_END)
        self._files[name] = opened
        return opened

    def flush(self) -> dict[str, int]:
        """Hand everything written so far to the system.

        Returns:
            The files' lengths in bytes, by absolute path; also of files that the script has not
            opened again yet and of closed ones.
        """
        lengths = dict(self._saved)
        self._closed = {}
        for name in self.names():
            opened = self._files.get(name)
            if opened is not None and not opened.closed:
                opened.flush()
                lengths[name] = os.fstat(opened.fileno()).st_size
                continue
            with suppress(OSError):  # it is gone
                found = os.stat(name)  # noqa: PTH116  # there may be thousands
                self._closed[name] = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
                if opened is not None:
                    lengths[name] = found.st_size
        return lengths

    def names(self) -> list[str]:
        """The files' absolute paths."""
        return list({**self._saved, **self._files})

    def unsynced(self) -> list[str]:
        """The files that must be synced before what was just flushed can be counted on."""
        return [
            name
            for name in self.names()
            if name not in self._closed or self._synced.get(name) != self._closed[name]
        ]

    def sent(self, generation: int) -> None:
        """What was just flushed is part of this snapshot, which is to be made durable."""
        self._sent = generation, self._closed

    def durable(self, generation: int) -> None:
        """This snapshot is durable; other ones than the last one sent are not counted."""
        if self._sent is not None and self._sent[0] == generation:
            self._synced = self._sent[1]

    def check(self) -> None:
        """Refuse files that lost what the checkpoint counts on.

        Raises:
            MismatchError: names the file, its length and the expected one.
        """
        for name, saved in self._saved.items():
            if name in self._files or saved:
                _check_length(name, saved)

    def roll_back(self) -> None:
        """Cut the files to what the checkpoint says."""
        for name, saved in self._saved.items():
            opened = self._files.get(name)
            if opened is not None and not opened.closed:
                opened.flush()
                opened.truncate(saved)
                opened.seek(0, os.SEEK_END)
            elif Path(name).exists():
                os.truncate(name, saved)


def _check_length(name: str, saved: int) -> None:
    found = Path(name).stat().st_size if Path(name).exists() else None
    if found is None or found < saved:
        what = "is gone" if found is None else f"has {found} bytes"
        raise MismatchError(
            f"the output file {name} {what}; it had {saved} bytes at the checkpoint. "
            "Put it back, or start over with `ckptd launch --fresh`. Nothing was changed."
        )
