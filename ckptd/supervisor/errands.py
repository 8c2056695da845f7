"""Questions to others that may take long, asked in threads; the answers come back to the loop.

A scheduler that is in trouble, or a network file system, may not answer for seconds or for ever.
Meanwhile the supervisor has to hear signals and to write what came.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

A = TypeVar("A")


class Errands:
    """Runs questions; `deliver` hands their answers over, in the caller's thread.

    Args:
        say: told of a question that failed, which is a bug of ours. It has no answer then and may
            be asked again: a training does not end because a notice could not be read.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._answers: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._readable, self._wake = os.pipe2(os.O_CLOEXEC)
        self._under_way: set[str] = set()

    def fileno(self) -> int:
        """Readable when an answer is there."""
        return self._readable

    def ask(self, name: str, question: Callable[[], A], then: Callable[[A], object]) -> None:
        """Ask, unless a question of this name is still unanswered.

        Args:
            name: of the question.
            question: called in a thread; has answers for what can go wrong.
            then: called with the answer by `deliver`.
        """
        if name in self._under_way:
            return
        self._under_way.add(name)
        threading.Thread(
            target=self._find_out, args=(name, question, then), name=name, daemon=True
        ).start()

    def deliver(self) -> None:
        """Hand the next answer over; only to be called when `fileno` is readable."""
        os.read(self._readable, 1)
        self._answers.get()()

    def _find_out(
        self, name: str, question: Callable[[], Any], then: Callable[[Any], object]
    ) -> None:
        try:
            answer = question()
        except Exception as error:  # noqa: BLE001  # whatever it is: others wait for this name
            why = f"a question ({name}) failed: {error!r}. Please report this"
            then, answer = self._say, why

        def hand_over() -> None:
            self._under_way.discard(name)
            then(answer)

        self._answers.put(hand_over)
        os.write(self._wake, b".")
