"""What the user sees of a running job: its output, our messages, and one quiet line of progress.

Rules:

1. Nothing here blocks and nothing raises, wherever our streams lead: see `outlet`.
2. The line is drawn only where standard error is a terminal, and only when the last output ended
   its line, so that it never lands inside the job's own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import IO, Any, Final

from ckptd.supervisor.outlet import Hand, Outlet, same_place
from ckptd.supervisor.run import Run

_CLEAR: Final = "\r\x1b[K"
_WIDTH: Final = 100
_DRAIN_S: Final = 5.0
_LAST_WORD_S: Final = 0.5


class Terminal:
    """Standard output and standard error of `ckptd launch`."""

    def __init__(self) -> None:
        output, messages = _descriptor(sys.stdout), _descriptor(sys.stderr)
        self._hands = [Hand()] if same_place(output, messages) else [Hand(), Hand()]
        self._output = Outlet(output, self._hands[0], self._output_failed)
        self._messages = Outlet(messages, self._hands[-1], _ignored)
        self._draws = os.isatty(messages)
        self._drawn = False
        self._line_ended = True
        self._said: set[str] = set()
        self._output_gone = False

    def say(self, text: str) -> None:
        """Tell the user one thing."""
        self._clear()
        lines = "".join(f"ckptd: {line}\n" for line in text.splitlines())
        self._messages.put(lines.encode(errors="backslashreplace"))

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
        if not self._output.put(chunk):
            self.say_once(
                "standard output is not read: a part will be missing there, not in the log"
            )
        self._line_ended = chunk.endswith(b"\n")

    def progress(self, line: Callable[[], str] | None) -> None:
        """Draw the line of progress; None: take it away."""
        if line is None:
            self._clear()
        elif self._draws and self._line_ended and not self._messages.waiting:
            self._messages.put(f"{_CLEAR}ckptd: {line()[:_WIDTH]}".encode(errors="replace"))
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

    def drain(self) -> None:
        """Before we end: wait until all of it was taken, unless nobody takes it."""
        until_s = time.monotonic() + _DRAIN_S
        for hand in self._hands:
            hand.drain(until_s - time.monotonic())
        lost = self._output.waiting + self._output.dropped
        if lost and not self._output_gone:
            self.say(f"{lost} bytes of the output were not taken from standard output")
            self._hands[-1].drain(_LAST_WORD_S)

    def _clear(self) -> None:
        if self._drawn:
            self._drawn = False
            self._messages.put(_CLEAR.encode())

    def _output_failed(self, error: OSError) -> None:
        if not self._output_gone:
            self._output_gone = True
            self.say(f"standard output is gone ({error.strerror}); the log has the rest")


def _descriptor(stream: IO[Any] | None) -> int:
    """Of one of our streams; -1: we were started without it, and its number may be another's."""
    return -1 if stream is None else stream.fileno()


def _ignored(_: OSError) -> None:
    """A terminal that was closed hears nothing more; the journal has what was said."""
