"""What the user sees of a running job: its output, our messages, and one quiet line of progress.

The line is drawn only where standard error is a terminal, and only when the last output ended its
line, so that it never lands inside the job's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import IO, Final

from ckptd.supervisor.run import Run

_CLEAR: Final = "\r\x1b[K"
_WIDTH: Final = 100


class Terminal:
    """Standard output and standard error of `ckptd launch`."""

    def __init__(self, output: IO[bytes] | None = None, messages: IO[str] | None = None) -> None:
        self._output = output or sys.stdout.buffer
        self._messages = messages or sys.stderr
        self._draws = self._messages.isatty()
        self._drawn = False
        self._line_ended = True
        self._said: set[str] = set()
        self._output_gone = False

    def say(self, text: str) -> None:
        """Tell the user one thing."""
        self._clear()
        try:
            self._messages.write("".join(f"ckptd: {line}\n" for line in text.splitlines()))
            self._messages.flush()
        except OSError:
            return  # the terminal was closed: the journal has it too

    def say_once(self, text: str) -> None:
        """The same, but never twice."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def pass_on(self, chunk: bytes) -> None:
        """The command's output."""
        if self._output_gone:
            return
        self._clear()
        try:
            self._output.write(chunk)
            self._output.flush()
        except OSError as error:
            self._output_gone = True
            # What is still buffered would fail once more at our exit, and turn its code into 120.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._output.fileno())
            os.close(null)
            self.say(f"standard output is gone ({error.strerror}); the log has the rest")
        self._line_ended = chunk.endswith(b"\n")

    def progress(self, line: Callable[[], str] | None) -> None:
        """Draw the line of progress; None: take it away."""
        if line is None:
            self._clear()
        elif self._draws and self._line_ended:
            self._messages.write(f"{_CLEAR}ckptd: {line()[:_WIDTH]}")
            self._messages.flush()
            self._drawn = True

    def report(self, last_lines: list[bytes], run: Run) -> None:
        """What a person needs after giving up: the last output, and what to do."""
        if last_lines:
            self.say("the last lines of its output:")
            for line in last_lines:
                self.say("  " + line.decode("utf-8", "replace"))
        name = run.path.name
        self.say(
            f"all of its output: {run.log}\n"
            f"what happened when: {run.journal}\n"
            f"mend it and start it with the same line again; see also `ckptd status {name}`"
        )

    def _clear(self) -> None:
        if self._drawn:
            self._messages.write(_CLEAR)
            self._messages.flush()
            self._drawn = False
