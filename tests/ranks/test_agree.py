"""`agree.target`: wherever ranks stand when they are asked, they flush at one place, and none has
passed it.

Ranks of one script go through the same moments in the same order. A collective is a moment that
nobody gets past before all have come to it. That is all a rank is here: its script as the list of
its moments, and how many of them it has behind it. Every combination of these that collectives
allow is tried, so every way in which ranks can have been interleaved.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations

import pytest

from ckptd import agree
from ckptd.agree import Position

Target = Callable[..., Position | None]


@dataclass(frozen=True)
class Moment:
    """What a rank's status page says from here on; "check": a safe point, at a position of its
    own; "collective": nobody goes on before all are here."""

    page: Position
    kind: str = ""
    at: Position = ()


@dataclass
class Loop:
    """A loop of a script; `left_at`: broken out of after so many items; None: never."""

    items: int
    body: list[Loop | str] = field(default_factory=list)
    left_at: int | None = None


def moments(script: list[Loop | str]) -> list[Moment]:
    """A script's moments, in the order in which `worker/loops.py` comes to them."""
    found = [Moment(())]
    _body(script, (), found)
    return found


def _body(body: list[Loop | str], outer: Position, found: list[Moment]) -> None:
    ordinal = 0
    for part in body:
        if isinstance(part, str):
            found.append(Moment(found[-1].page, part))
            continue
        position = (*outer, (ordinal, 0))
        ordinal += 1
        found += [Moment(position), Moment(position, "check", position)]  # its entry
        for item in range(part.items):
            found.append(Moment(position, "check", position))
            _body(part.body, position, found)
            if part.left_at == item:
                break
            position = (*outer, (position[-1][0], item + 1))
            found.append(Moment(position))
        else:
            found += [Moment(position, "check", position)] * 2  # no item left; its end
        found.append(Moment(outer))


def places(script: list[Moment], ranks: int) -> Iterator[tuple[int, ...]]:
    """How many moments each rank can have behind it; in one order of the ranks only."""
    barriers = [i for i, moment in enumerate(script) if moment.kind == "collective"]

    def reached(behind: int) -> int:
        """How many collectives all must have come to."""
        return sum(one < behind for one in barriers)

    def chosen(least: int, left: int) -> Iterator[tuple[int, ...]]:
        if left == 0:
            yield ()
            return
        for behind in range(least, len(script) + 1):
            for rest in chosen(behind, left - 1):
                yield (behind, *rest)

    for one in chosen(1, ranks):
        needed = reached(one[-1])  # by the furthest one, of the one that is furthest behind
        if needed == 0 or one[0] >= barriers[needed - 1]:
            yield one


def flushes(script: list[Moment], behind: int, target: Position) -> int | None:
    """Where a rank flushes; None: the script ends before."""
    for number in range(behind, len(script)):
        moment = script[number]
        if moment.kind == "check" and moment.at >= target:
            return number
    return None


def items_between(script: list[Moment], behind: int, end: int) -> int:
    """How many items of the loop that a rank is in are done meanwhile."""
    *outer, (ordinal, _) = script[behind - 1].page
    pages = [moment.page for moment in script[behind - 1 : end]]
    within = [one for one in pages if list(one[: len(outer)]) == outer and len(one) > len(outer)]
    done = {one[len(outer)] for one in within if one[len(outer)][0] == ordinal}
    return len(done) - 1


def wrong(script: list[Moment], ranks: int, target: Target) -> list[str]:
    """What goes wrong for which places of the ranks."""
    found = []
    for behind in places(script, ranks):
        pages = [script[one - 1].page for one in behind]
        for patient in (True, False):
            upon = target(pages, patient=patient)
            if upon is None:
                continue
            ends = {flushes(script, one, upon) for one in behind}
            if len(ends) > 1:
                found.append(f"{pages}: {upon}, at {ends}")
            # What passed a check with the target's position has passed the target.
            last = behind[-1]
            if any(m.kind == "check" and m.at >= upon for m in script[:last]):
                found.append(f"{pages}: {upon} was passed")
            (end, *_) = ends
            loops = {(page[:-1], page[-1][0]) for page in pages if page}
            alike = len(loops) == 1 and () not in pages
            if alike and end is not None and items_between(script, last, end) > 1:
                found.append(f"{pages}: {upon} is further than an item away")
    return found


STEPS = Loop(3, ["collective"])
EPOCHS = {
    "steps": [STEPS],
    "no collectives": [Loop(3)],
    "epochs": [Loop(2, [STEPS, Loop(2), "collective"])],
    "evaluation every other step": [Loop(2, [Loop(2, ["collective", Loop(2)])])],
    "broken out of": [Loop(2, [Loop(4, ["collective"], left_at=1), "collective", Loop(2)])],
    "nothing in it": [Loop(2, [Loop(0), Loop(1, ["collective"])])],
    "one after the other": [Loop(2, ["collective"]), "collective", Loop(2), Loop(2)],
    "three deep": [Loop(2, [Loop(2, [Loop(2, ["collective"])])])],
}


@pytest.mark.parametrize("name", EPOCHS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_flush_at_one_place(name: str, ranks: int) -> None:
    """Wherever they are: at the same one, which none has passed, and no item too late."""
    assert wrong(moments(EPOCHS[name]), ranks, agree.target) == []


def test_any_script() -> None:
    """The same for scripts that are drawn at random."""
    for seed in range(150):
        rng = random.Random(seed)
        script = moments(_drawn(rng, 3) or [STEPS])[:60]
        assert wrong(script, 2, agree.target) == [], f"seed {seed}"


def _drawn(rng: random.Random, depth: int) -> list[Loop | str]:
    if depth == 0:
        return rng.choice([[], ["collective"]])
    parts: list[Loop | str] = []
    for _ in range(rng.randint(0, 2)):
        items = rng.randint(0, 3)
        left_at = rng.choice([None, None, rng.randint(0, 3)])
        parts.append(Loop(items, _drawn(rng, depth - 1), left_at))
        parts += rng.choice([[], ["collective"]])
    return parts


def current_item(pages: list[Position], *, patient: bool) -> Position | None:
    """As it is, without the end of the item."""
    upon = agree.target(pages, patient=patient)
    return None if upon is None else (*upon[:-1], (upon[-1][0], upon[-1][1] - 1))


def of_the_slowest(pages: list[Position], *, patient: bool) -> Position | None:
    upon = min(pages)
    return (*upon[:-1], (upon[-1][0], upon[-1][1] + 1)) if upon else None


def of_the_furthest(pages: list[Position], *, patient: bool) -> Position | None:
    """Also where another rank may be behind its loop."""
    upon = max(pages)
    return (*upon[:-1], (upon[-1][0], upon[-1][1] + 1)) if upon else None


def an_item_later(pages: list[Position], *, patient: bool) -> Position | None:
    upon = agree.target(pages, patient=patient)
    return None if upon is None else (*upon[:-1], (upon[-1][0], upon[-1][1] + 1))


@pytest.mark.parametrize(
    "broken",
    [current_item, of_the_slowest, of_the_furthest, an_item_later],
    ids=lambda f: f.__name__,
)
def test_what_is_wrong_is_seen(broken: Target) -> None:
    """Rules that look as good are found out."""
    assert any(wrong(moments(script), 2, broken) for script in EPOCHS.values())


@pytest.mark.parametrize("name", EPOCHS)
def test_patience_ends(name: str) -> None:
    """There is a target as soon as no rank is between two loops of an item in which another one
    is in a loop; and, without patience, wherever all are in a loop."""
    script = moments(EPOCHS[name])
    for behind in places(script, 2):
        pages = [script[one - 1].page for one in behind]
        nearer, further = sorted(pages, key=len)
        if nearer == further != () or further[: len(nearer)] != nearer:
            assert agree.target(pages, patient=True) is not None, pages
        if nearer:
            assert agree.target(pages, patient=False) is not None, pages


def test_one_rank_alone_in_a_loop() -> None:
    """An evaluation by rank 0 alone, for which the others wait: the end of the item around it."""
    alone: list[Position] = [((0, 4), (1, 2)), ((0, 4),), ((0, 4),)]
    assert agree.target(alone, patient=True) is None
    assert agree.target(alone, patient=False) == ((0, 5),)
    assert agree.is_far(((0, 5),), alone)


def test_a_rank_that_is_ahead() -> None:
    """Others wait in the next epoch's first step for a rank that evaluates between two loops: they
    all come to that step, so nobody waits for the end of that epoch."""
    ahead: list[Position] = [((0, 4),), ((0, 5), (0, 0)), ((0, 5), (0, 0))]
    assert agree.target(ahead, patient=True) == ((0, 5), (0, 1))


def test_the_order_of_ranks_does_not_matter() -> None:
    """Whoever is the furthest."""
    pages: list[Position] = [((0, 1), (0, 7)), ((0, 1), (0, 9)), ((0, 1), (2, 0))]
    for one in permutations(pages):
        assert agree.target(one, patient=True) == ((0, 1), (2, 1))
