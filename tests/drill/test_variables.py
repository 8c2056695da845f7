"""Which variables a script may still read, from its byte code."""

from __future__ import annotations

import sys
from pathlib import Path

from ckptd.worker import variables


def standing(function, line):
    """The live variables of `function` as it stands in the line with this mark."""
    found = []

    def look():
        found.append(variables.live(sys._getframe(1)))

    function(look)
    return found[line]


def test_overwritten_before_it_is_read() -> None:
    """A variable that every way assigns anew first is not live."""

    def script(look):
        kept, overwritten = 1, 2
        look()
        overwritten = kept + 1
        return kept + overwritten

    assert standing(script, 0) == {"kept"}


def test_read_after_the_loop() -> None:
    """A variable that is read after the loop is live within it."""

    def script(look):
        for item in range(2):
            loss = item
            look()
        return loss

    assert "loss" in standing(script, 0)


def test_temporaries() -> None:
    """What each item sets before it reads it, is not live between two items."""

    def script(look):
        total = 0
        for item in range(3):
            look()
            square = item * item
            total += square
        return total

    live = standing(script, 1)
    assert "total" in live
    assert "square" not in live


def test_branches() -> None:
    """A variable that only one of two ways reads is live."""

    def script(look, flag=False):
        first = second = 1
        look()
        if flag:
            return first
        second = len("two")
        return second + second

    live = standing(script, 0)
    assert "first" in live
    assert "second" not in live


def test_closures() -> None:
    """A variable that a function inside reads is live as long as the function may be called."""

    def script(look):
        captured = 1

        def inside():
            return captured

        look()
        return inside()

    assert "captured" in standing(script, 0)


def test_comprehensions_and_exceptions() -> None:
    """Other kinds of code are followed too."""

    def script(look):
        names = ["a"]
        try:
            look()
            upper = [name.upper() for name in names]
        except ValueError:
            upper = []
        with Path("/dev/null").open() as null:
            return upper, null

    live = standing(script, 0)
    assert "names" in live
