"""The runs of a drill: each in a copy of the working directory, under `ckptd launch`.

A script writes files beside itself, so two runs in one directory would write over each other's, and
over the user's. What is too large to copy is linked, and said.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from ckptd import record
from ckptd.errors import CkptdError
from ckptd.record import Seen, Strike
from ckptd.supervisor.policy import Exit

_COPIED_BYTES_MAX: Final = 16 * 2**20
_COPIED_FILES_MAX: Final = 5_000
_LAST_LINES: Final = 12
_POLL_S: Final = 0.2
#: Sees a job through that was interrupted more often than planned (a preemption of the drill).
_SPARE_LAUNCHES: Final = 3

#: A file's length in bytes and the sum of its content.
Content = tuple[int, str]


class Finished(msgspec.Struct, frozen=True):
    """What one run left.

    Attributes:
        code: the last exit code of `ckptd launch`.
        seen: its marks.
        files: path -> content, of files that it made or changed in its working directory.
        outputs: those of them (or elsewhere) that it opened through `job.open`.
        output: what it printed.
    """

    code: int
    seen: list[Seen]
    files: dict[str, Content]
    outputs: list[str]
    output: str

    def last_lines(self) -> str:
        """The end of what it printed."""
        return "\n".join(self.output.splitlines()[-_LAST_LINES:])

    def failure(self) -> str:
        """What it printed from its last traceback on, without what the supervisor repeats."""
        lines = [line for line in self.output.splitlines() if not line.startswith("ckptd:")]
        begins = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
        return "\n".join(lines[begins[-1] if begins else 0 :][-_LAST_LINES:])


class DrilledRun:
    """One run, from a copy of the working directory to what it left.

    Args:
        place: a directory of its own, not there yet.
        source: the working directory.
        argv: the command.
        options: for `ckptd launch`.
    """

    def __init__(
        self, place: Path, source: Path, argv: Sequence[str], options: Sequence[str] = ()
    ) -> None:
        self.place = place
        self.work = place / "work"
        self._argv, self._options = list(argv), list(options)
        place.mkdir(parents=True)
        self.linked = _mirror(source, self.work, avoid=place.parent)
        self._before = _files(self.work)

    def run(self, strikes: Sequence[Strike], progress: Callable[[int], None]) -> Finished:
        """Run the command to its end, starting it again whenever it was interrupted.

        Args:
            strikes: where it is interrupted.
            progress: is told now and then how many safe points were passed so far.
        """
        (self.place / record.PLAN).write_bytes(record.encode_plan(list(strikes)))
        for _ in range(len(strikes) + _SPARE_LAUNCHES + 1):
            code = self._launch(progress)
            if code not in (Exit.INTERRUPTED, -signal.SIGKILL):
                break
        seen = self._marks()
        outputs = seen[-1].mark.outputs if seen else []
        return Finished(code, seen, self._written(outputs), self._relative(outputs), self._output())

    def _launch(self, progress: Callable[[int], None]) -> int:
        launch = (sys.executable, "-m", "ckptd", "launch", "--dir", str(self.place / "runs"))
        # No requests but those of the strikes; and an interruption of a drill must not put the job
        # into the queue in which it is drilled.
        alone = ("--every", "1e9", "--overhead", "0", "--host", "none")
        settings = ("--name", "drill", *alone, "--max-restarts", "2", "--no-resume", *self._options)
        environment = {
            **os.environ,
            record.ENV_DRILL: str(self.place),
            "CKPTD_BACKOFF": "0.01",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with (self.place / "output").open("ab") as output:
            process = subprocess.Popen(
                [*launch, *settings, "--", *self._argv],
                cwd=self.work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is ours alone
            )
            try:
                while True:
                    try:
                        return process.wait(_POLL_S)
                    except subprocess.TimeoutExpired:
                        progress(self._count_marks())
            except BaseException:
                process.terminate()
                process.wait()
                raise

    def _count_marks(self) -> int:
        marks = self.place / record.MARKS
        return marks.read_bytes().count(b"\n") if marks.exists() else 0

    def _marks(self) -> list[Seen]:
        marks = self.place / record.MARKS
        if not marks.exists():
            return []
        with marks.open("rb") as lines:
            return record.expand(lines)

    def _written(self, outputs: Sequence[str]) -> dict[str, Content]:
        written = {
            path: content
            for path, content in _files(self.work).items()
            if self._before.get(path) != content
        }
        for output, name in zip(outputs, self._relative(outputs), strict=True):
            if name not in written and Path(output).is_file():
                written[name] = _content(Path(output))
        return written

    def _relative(self, outputs: Sequence[str]) -> list[str]:
        """Paths within the working directory by their relative name, others as they are."""
        return [str(Path(path)).removeprefix(f"{self.work}{os.sep}") for path in outputs]

    def _output(self) -> str:
        return (self.place / "output").read_text(encoding="utf-8", errors="replace")


def _mirror(source: Path, target: Path, *, avoid: Path) -> list[str]:
    """Copy a directory's small files; link what is large or no part of the script's work.

    Returns:
        What was linked, relative to `source`: a script that writes there writes to the original.
    """
    linked: list[str] = []
    left = _COPIED_FILES_MAX
    todo = [(source, target)]
    while todo:
        there, here = todo.pop()
        here.mkdir()
        entries = sorted(there.iterdir(), key=lambda entry: entry.name)
        for entry in entries:
            if entry in (avoid, source / "ckptd-runs") or entry.name in (".git", "__pycache__"):
                continue
            is_directory = entry.is_dir() and not entry.is_symlink()
            if is_directory and not _is_foreign(entry) and left > 0:
                todo.append((entry, here / entry.name))
                continue
            is_small = entry.is_file() and entry.stat().st_size <= _COPIED_BYTES_MAX
            if is_directory or not is_small or left <= 0:
                (here / entry.name).symlink_to(entry.resolve())
                linked.append(str(entry.relative_to(source)))
                continue
            shutil.copy2(entry, here / entry.name)
            left -= 1
    return linked


def _is_foreign(directory: Path) -> bool:
    """Environments and caches."""
    return directory.name.startswith(".") or (directory / "pyvenv.cfg").exists()


def _files(directory: Path) -> dict[str, Content]:
    """Every file that was copied or written, by its relative path."""
    found = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink() and path.is_file():
                found[str(path.relative_to(directory))] = _content(path)
    return found


def _content(path: Path) -> Content:
    hasher = xxhash.xxh3_128()
    length = 0
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            hasher.update(chunk)
            length += len(chunk)
    return length, hasher.hexdigest()


def need_marks(finished: Finished) -> None:
    """Refuse a script that attached no job.

    Raises:
        CkptdError: it came by no safe point.
    """
    if not finished.seen:
        raise CkptdError(
            "the script never came by a safe point: it must call `ckptd.attach(…)` and iterate "
            f"over `job.loop(…)`. It printed:\n{finished.last_lines()}"
        )
