"""What is known of the programs that start the ranks of a job."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

#: Start a training on one node, or on each of several.
TORCHRUN: Final = ("torchrun", "torch.distributed.run")
_RESTARTS: Final = ("--max-restarts", "--max_restarts")


def restarts(argv: Sequence[str]) -> str | None:
    """The option by which a launcher within a command starts ranks again itself; None: it won't."""
    words = list(_words(argv))
    starts = [number for number, word in enumerate(words) if Path(word).name in TORCHRUN]
    for word, following in pairwise((*words[starts[0] :], "") if starts else ()):
        if word.endswith(".py"):
            return None  # what comes now are the script's own options
        option, _, value = word.partition("=")
        if option in _RESTARTS and (value or following) != "0":
            return option
    return None


def _words(argv: Sequence[str]) -> Iterator[str]:
    """Those of a command, and of a line for a shell within it."""
    for word in argv:
        try:
            yield from shlex.split(word) if " " in word else [word]
        except ValueError:  # not for a shell
            yield word
