"""Upon which safe point ranks agree: in every moment at which they can be asked, of some programs.

A rank's way through a program is a list of events: it is somewhere, it is at a safe point, it is in
a collective with the others. Ranks are asked at every combination of moments that the collectives
allow, and what is read of each is any place between there and where it then stands still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import pytest

from ckptd import agree
from ckptd.agree import Position


class Event(NamedTuple):
    kind: str  # "at", "safe", "together"
    position: Position


Way = list[Event]


def loop(around: Position, ordinal: int, items: int, *, left_at: int | None = None) -> Way:
    """A loop in whose items nothing is done with others; `left_at`: it is broken out of."""
    way = [Event("safe", (*around, (ordinal, 0)))]
    for done in range(items):
        way.append(Event("safe", (*around, (ordinal, done))))
        if done == left_at:
            return [*way, Event("at", around)]
    end = (*around, (ordinal, items))
    return [*way, Event("safe", end), Event("safe", end), Event("at", around)]


def training(around: Position, items: int, **more: int) -> Way:
    """The same with a collective in each item."""
    way: Way = []
    safe = loop(around, 0, items, **more)
    for number, event in enumerate(safe):
        way.append(event)
        if event.kind == "safe" and 0 < number <= items:
            way.append(Event("together", event.position))
    return way


def epochs(*bodies: Way) -> Way:
    """An outer loop, of which each item is one of these."""
    way = [Event("safe", ((0, 0),))]
    for done, body in enumerate(bodies):
        way += [Event("safe", ((0, done),)), *body]
    end = ((0, len(bodies)),)
    return [*way, Event("safe", end), Event("safe", end)]


def epoch(number: int, *, evaluates: bool = True, **more: int) -> Way:
    around = ((0, number),)
    way = training(around, 2, **more)
    if evaluates:
        way += loop(around, 1, 2)
    return [*way, Event("together", around)]


SAME = {
    "one loop": training((), 4),
    "epochs": epochs(epoch(0), epoch(1)),
    "left": epochs(epoch(0, left_at=1), epoch(1)),
}
FIRST_EVALUATES = [
    epochs(epoch(0), epoch(1)),
    epochs(epoch(0, evaluates=False), epoch(1, evaluates=False)),
]


def collectives(way: Way, index: int) -> int:
    """How many a rank has come to that has done so many events."""
    return sum(event.kind == "together" for event in way[:index])


def advance(ways: Sequence[Way], at: list[int], stops: list[set[int]]) -> list[int]:
    """Let all go on until they stand where they are to stop, or nobody can go on."""
    moved = True
    while moved:
        moved = False
        for rank, way in enumerate(ways):
            while at[rank] < len(way) and at[rank] not in stops[rank]:
                # Who is in a collective goes on when all others have come to it.
                if way[at[rank] - 1].kind == "together" and at[rank] > 0:
                    done = collectives(way, at[rank])
                    if any(collectives(w, i) < done for w, i in zip(ways, at, strict=True)):
                        break
                at[rank] += 1
                moved = True
    return at


def moments(ways: Sequence[Way]) -> Iterator[tuple[int, ...]]:
    """After how many events each rank can be at one time."""
    for at in product(*(range(1, len(way) + 1) for way in ways)):
        come = [collectives(way, index) for way, index in zip(ways, at, strict=True)]
        # Who has left a collective has left it because all had come to it.
        left = [
            collectives(way, index) - (way[index - 1].kind == "together")
            for way, index in zip(ways, at, strict=True)
        ]
        if max(left) <= min(come):
            yield at


def where(way: Way, index: int) -> Position:
    """What a rank's page shows after so many events."""
    return next((e.position for e in reversed(way[:index]) if e.kind != "together"), ())


def asked(ways: Sequence[Way]) -> Iterator[tuple[list[int], list[Position]]]:
    """Where the ranks stand still after they were asked, and what may be read of them by then."""
    for at in moments(ways):
        # A safe point at which it is just now has been passed: it looked before it was asked.
        stops = [
            {i + 1 for i in range(index, len(way)) if way[i].kind == "safe"}
            for way, index in zip(ways, at, strict=True)
        ]
        standing = advance(ways, list(at), stops)
        reads = [
            {where(way, i) for i in range(index, still + 1)}
            for way, index, still in zip(ways, at, standing, strict=True)
        ]
        for positions in product(*reads):
            yield standing, list(positions)


def stopped(ways: Sequence[Way], standing: list[int], target: Position) -> list[int]:
    """Where each answers: at its first safe point from where it stands that is not before it."""
    stops = [
        {
            i + 1
            for i in range(len(way))
            if i + 1 >= still and way[i].kind == "safe" and way[i].position >= target
        }
        for way, still in zip(ways, standing, strict=True)
    ]
    return advance(ways, list(standing), stops)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("program", SAME)
def test_all_answer_at_one_place(program: str, ranks: int) -> None:
    """Nobody has passed it, nobody waits for ever, and all are at the very same event of the
    program. In one loop it is at most one item from where the furthest was."""
    ways = [SAME[program]] * ranks
    decided = 0
    for standing, positions in asked(ways):
        for patient in (True, False):
            target = agree.target(positions, patient=patient)
            if target is None:
                continue
            decided += 1
            ends = stopped(ways, standing, target)
            assert len(set(ends)) == 1, (positions, target, ends)
            if patient:
                assert target[:-1] == max(positions)[:-1]
                assert target[-1][1] == max(positions)[-1][1] + 1
    assert decided > 0


def test_a_loop_that_one_rank_has_alone() -> None:
    """They answer at the end of the item around it, where both come to. Only if they are asked in
    the very last item before it, they may find themselves apart, which is seen and said."""
    ways = FIRST_EVALUATES
    within = 0
    for standing, positions in asked(ways):
        target = agree.target(positions, patient=False)
        if target is None:
            continue
        ends = stopped(ways, standing, target)
        found = [where(way, end) for way, end in zip(ways, ends, strict=True)]
        if found[0] != found[1]:
            assert target[-1] == (0, 3), (positions, target, found)
        within += len(positions[0]) > len(positions[1])
    assert within > 0


def test_they_are_asked_again_while_they_are_apart() -> None:
    """Rather than to wait for the end of an outer item, which may be hours away."""
    apart = [((0, 3), (0, 99)), ((0, 4),)]
    assert agree.target(apart, patient=True) is None
    assert agree.target(apart, patient=False) == ((0, 5),)


def test_outside_of_all_loops_there_is_nothing_to_agree_upon() -> None:
    """However long it takes until all are within one."""
    for patient in (True, False):
        assert agree.target([(), ((0, 3),)], patient=patient) is None
        assert agree.target([(), ()], patient=patient) is None
