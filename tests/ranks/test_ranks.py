"""`supervisor/ranks.py`: which snapshots make a state, and how ranks are asked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_positions import Peer, is_at

from ckptd import wire
from ckptd.agree import Position
from ckptd.supervisor.ranks import Ranks
from ckptd.supervisor.writer import Part

SIZE = 3
LATER_S = 1.0


def hello(rank: int, size: int = SIZE) -> wire.Hello:
    return wire.Hello(wire.PROTOCOL, 1000 + rank, rank, size, {})


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Three of them, all attached."""
    found = Ranks()
    for rank in range(SIZE):
        assert found.refusal(hello(rank)) is None
        found.admit(hello(rank), Peer())
    yield found
    found.close()


def part(rank: int, generation: int, place: str, asked: int = 0) -> Part:
    """What a rank sends; its memory is empty."""
    message = wire.Snapshot(generation, 5, wire.Place(0, 0), asked, place=place)
    return Part(rank, message, wire.Table([], []), os.open(os.devnull, os.O_RDONLY))


def answered(ranks: Ranks, rank: int, asked: int, place: str, now_s: float) -> str | None:
    """A rank answers a request, by its third snapshot."""
    one = part(rank, 3, place, asked)
    os.close(one.descriptor)
    return ranks.answered(one, now_s)


def names(parts: list[Part] | None) -> list[tuple[int, int]] | None:
    """Whose, and the how-manieth."""
    if parts is None:
        return None
    for one in parts:
        os.close(one.descriptor)
    return [(one.rank, one.snapshot.generation) for one in parts]


def gathered(ranks: Ranks, *sent: tuple[Any, ...]) -> list[tuple[object, object]]:
    """What comes of snapshots that come in this order."""
    found = []
    for one in sent:
        whole, dropped = ranks.gather(part(*one))
        found.append((names(whole), names(dropped)))
    return found


# ------------------------------------------------------------------ who is there


def test_who_is_refused() -> None:
    """No rank twice, none of another number of ranks, none that can't be."""
    ranks = Ranks()
    assert "rank 3 of 3" in str(ranks.refusal(hello(3)))
    ranks.admit(hello(1), Peer())
    assert ranks.refusal(hello(0)) is None
    assert "leave --max-restarts at 0" in str(ranks.refusal(hello(1)))
    assert "it is one of 2 ranks, and one of 3" in str(ranks.refusal(hello(0, 2)))
    assert ranks.missing() == "0, 2"
    ranks.close()


def test_attached(ranks: Ranks) -> None:
    """Only while all are there; complete stays true."""
    assert ranks.attached()
    last = ranks.worker(2)
    assert last is not None
    last.peer = None
    assert (ranks.attached(), ranks.anybody(), ranks.complete()) == (False, True, True)
    assert ranks.described() == "2 of 3 attached"


def test_what_all_have_said(ranks: Ranks) -> None:
    """A sum and a maximum, but only when all have said theirs; and an end, when all have ended."""
    for number, worker in enumerate(ranks):
        assert (ranks.length(), ranks.restored_s(), ranks.finished()) == (None, None, False)
        worker.length, worker.restored_s, worker.finished = 10 + number, 1.0 + number, True
    assert (ranks.length(), ranks.restored_s(), ranks.finished()) == (33, 3.0, True)


# ------------------------------------------------------------------ what makes a state


def test_one_of_each(ranks: Ranks) -> None:
    """A state is one snapshot of each rank, by rank, in whatever order they come."""
    found = gathered(ranks, (2, 1, "a"), (0, 1, "a"), (1, 7, "a"))
    assert found == [(None, []), (None, []), ([(0, 1), (1, 7), (2, 1)], [])]


def test_of_one_place(ranks: Ranks) -> None:
    """Snapshots of different places make none."""
    found = gathered(ranks, (0, 1, "a"), (1, 1, "a"), (2, 1, "b"), (0, 2, "b"), (1, 2, "b"))
    assert found[:4] == [(None, [])] * 4
    assert found[4] == ([(0, 2), (1, 2), (2, 1)], [(0, 1), (1, 1)]), "what is older is let go of"


def test_sent_again(ranks: Ranks) -> None:
    """Of two of one place the newer counts, and the older is let go of."""
    found = gathered(ranks, (0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (2, 1, "a"))
    assert found[1] == (None, [(0, 1)])
    assert found[3] == ([(0, 2), (1, 1), (2, 1)], [])


def test_no_more_than_two_wait(ranks: Ranks) -> None:
    """A rank that is alone with what it sends, holds two memories in the end and not all."""
    found = gathered(ranks, *[(0, number, f"place {number}") for number in range(1, 6)])
    assert found == [(None, []), (None, []), (None, [(0, 1)]), (None, [(0, 2)]), (None, [(0, 3)])]


def test_an_answer_waits_longest(ranks: Ranks) -> None:
    """A rank has answered and trains on, past the beginnings of two evaluations: the others come to
    where it has answered only then."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=False)
    looked(ranks)
    sent = [(0, 1, "asked", word(ranks)), (0, 2, "one"), (0, 3, "other")]
    sent += [(rank, 1, "asked", word(ranks)) for rank in (1, 2)]
    found = gathered(ranks, *sent)
    assert found[2] == (None, [(0, 2)])
    assert found[4] == ([(0, 1), (1, 1), (2, 1)], [])


def open_now() -> list[Path]:
    """The descriptors of this process."""
    return sorted(Path("/proc/self/fd").iterdir())


def test_nothing_stays_open() -> None:
    """When an attempt ends, the memories that waited are closed."""
    before = open_now()
    ranks = Ranks()
    for rank in range(SIZE):
        ranks.admit(hello(rank), Peer())
    ranks.gather(part(1, 1, "a"))
    ranks.close()
    assert open_now() == before


# ------------------------------------------------------------------ how they are asked


def all_stand(ranks: Ranks, *positions: Position) -> None:
    for worker, position in zip(ranks, positions, strict=True):
        is_at(worker, *position)


def word(ranks: Ranks) -> int:
    """The request that all see."""
    (found,) = {int(worker.page.words[wire.WORD_REQUEST]) for worker in ranks}
    return found


def agreed(ranks: Ranks) -> Position | None:
    """Upon what all are told to have agreed."""
    (found,) = {worker.page.agreed(word(ranks)) for worker in ranks}
    return found


def looked(ranks: Ranks) -> float:
    """Look when it is due; when that was."""
    now_s = ranks.due_s()
    ranks.look(now_s)
    return now_s


NEAR: tuple[Position, ...] = (((0, 1), (0, 4)), ((0, 1), (0, 5)), ((0, 1), (0, 4)))
APART: tuple[Position, ...] = (((0, 1), (1, 2)), ((0, 1),), ((0, 1),))


def test_asked(ranks: Ranks) -> None:
    """First all are asked; then, when they have surely seen it, told; nothing before."""
    all_stand(ranks, *NEAR)
    ranks.ask(7, 0.0, leave=True)
    assert wire.request_of(word(ranks)) is wire.Request.LEAVE
    assert agreed(ranks) is None
    ranks.look(ranks.due_s() / 2)
    assert agreed(ranks) is None
    looked(ranks)
    assert agreed(ranks) == ((0, 1), (0, 6))
    assert math.isinf(ranks.due_s())
    assert ranks.serial_of(word(ranks)) == 7


def test_one_process_is_told_at_once() -> None:
    """Nobody has to agree with anybody."""
    ranks = Ranks()
    ranks.admit(hello(0, 1), Peer())
    ranks.ask(7, 0.0, leave=False)
    assert word(ranks) == wire.request_word(7, wire.Request.FLUSH)
    assert math.isinf(ranks.due_s())
    assert ranks.serial_of(word(ranks)) == 7
    ranks.close()


def test_asked_again(ranks: Ranks) -> None:
    """Where they are too far from each other they are let go on, and asked anew."""
    all_stand(ranks, *APART)
    ranks.ask(1, 0.0, leave=False)
    looked(ranks)
    assert agreed(ranks) == (), "go on"
    before = word(ranks)
    all_stand(ranks, *NEAR)
    looked(ranks)
    assert word(ranks) != before
    assert agreed(ranks) is None
    looked(ranks)
    assert agreed(ranks) == ((0, 1), (0, 6))
    assert ranks.serial_of(word(ranks)) == ranks.serial_of(before) == 1


def until_far(ranks: Ranks) -> None:
    """A rank is alone in a loop: asked often enough, they agree upon the end of the item."""
    all_stand(ranks, *APART)
    ranks.ask(1, 0.0, leave=True)
    while not agreed(ranks):
        assert looked(ranks) < 60
    assert agreed(ranks) == ((0, 2),)


def test_what_is_far_is_asked_again(ranks: Ranks) -> None:
    """When they are near each other meanwhile, they agree upon what is near."""
    until_far(ranks)
    all_stand(ranks, *NEAR)
    looked(ranks)
    assert agreed(ranks) is None
    looked(ranks)
    assert agreed(ranks) == ((0, 1), (0, 6))
    assert math.isinf(ranks.due_s())


def test_who_is_there_already_is_waited_for(ranks: Ranks) -> None:
    """A rank that has come to what is far may have answered: the others follow it."""
    until_far(ranks)
    first = word(ranks)
    all_stand(ranks, ((0, 2),), ((0, 1), (2, 5)), ((0, 1), (2, 5)))
    looked(ranks)
    looked(ranks)
    assert agreed(ranks) == ((0, 2),)
    assert answered(ranks, 0, first, "there", LATER_S) is None
    for rank in (1, 2):
        assert answered(ranks, rank, word(ranks), "there", LATER_S) is None
    assert ranks._request is None, "all have answered, in whichever words they were asked"


def test_who_has_answered_is_left_alone(ranks: Ranks) -> None:
    """It trains on, and is not asked for one snapshot after another while the others come."""
    until_far(ranks)
    asked = word(ranks)
    assert answered(ranks, 0, asked, "there", LATER_S) is None
    looked(ranks)
    assert word(ranks) == asked
    assert math.isinf(ranks.due_s())


def test_its_first_answer_counts(ranks: Ranks) -> None:
    """A rank that had answered, and sees the request in new words, answers once more, elsewhere."""
    until_far(ranks)
    first = word(ranks)
    all_stand(ranks, ((0, 2), (0, 0)), ((0, 1), (2, 5)), ((0, 1), (2, 5)))
    looked(ranks)
    assert answered(ranks, 0, first, "there", LATER_S) is None
    looked(ranks)
    again = word(ranks)
    assert again != first
    assert answered(ranks, 0, again, "further", LATER_S) is None
    assert answered(ranks, 1, again, "there", LATER_S) is None
    assert answered(ranks, 2, again, "there", LATER_S) is None


def test_whoever_comes_late_asks_again(ranks: Ranks) -> None:
    """A supervisor that was stopped does not decide from where the ranks are: they have gone on."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=False)
    before = word(ranks)
    ranks.look(60.0)
    assert word(ranks) != before
    assert agreed(ranks) is None
    assert ranks.due_s() > 60.0
    looked(ranks)
    assert agreed(ranks) == ((0, 1), (0, 6))


def test_before_the_first_loop(ranks: Ranks) -> None:
    """Nobody is told anything until all are in one."""
    ranks.ask(1, 0.0, leave=True)
    for _ in range(40):
        looked(ranks)
        assert not agreed(ranks)


def test_at_different_places(ranks: Ranks) -> None:
    """Ranks that do not go through the same loops: it is said, with who was where, and they are
    asked again."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=False)
    looked(ranks)
    asked = word(ranks)
    assert answered(ranks, 0, asked, "a.py:1", LATER_S) is None
    assert answered(ranks, 1, asked, "a.py:1", LATER_S) is None
    said = answered(ranks, 2, asked, "b.py:2", LATER_S)
    assert said is not None
    assert "rank 1 was at a.py:1, rank 2 at b.py:2" in said
    assert not math.isinf(ranks.due_s())
    looked(ranks)
    assert word(ranks) != asked
    looked(ranks)
    for rank in range(SIZE):
        assert answered(ranks, rank, word(ranks), "a.py:1", 2 * LATER_S) is None
    assert math.isinf(ranks.due_s())


def apart(ranks: Ranks) -> list[list[int]]:
    """Which snapshots of each rank it is told not to wait for."""
    sent: list[list[wire.ToWorker]] = [worker.peer.sent for worker in ranks]  # type: ignore[union-attr]
    return [[one.generation for one in all_ if isinstance(one, wire.Apart)] for all_ in sent]


def test_who_waits_to_leave_goes_on(ranks: Ranks) -> None:
    """At different places nothing becomes durable: nobody waits for it until the grace is over."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=True)
    looked(ranks)
    asked = word(ranks)
    for rank, place in enumerate(["a.py:1", "a.py:1", "b.py:2"]):
        assert apart(ranks) == [[]] * SIZE
        answered(ranks, rank, asked, place, LATER_S)
    assert apart(ranks) == [[3]] * SIZE
    assert not math.isinf(ranks.due_s())


def test_only_some_are_in_a_loop_that_begins_anew(ranks: Ranks) -> None:
    """That is no common place either."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=True)
    looked(ranks)
    asked = word(ranks)
    assert answered(ranks, 0, asked, "a.py:1", LATER_S) is None
    assert ranks.stood(1, asked, 2, LATER_S, states=[]) is None
    said = answered(ranks, 2, asked, "a.py:1", LATER_S)
    assert said is not None
    assert "was at a.py:1, others in a loop that begins anew" in said
    assert apart(ranks) == [[3], [2], [3]]


def test_standing(ranks: Ranks) -> None:
    """In a restart loop earlier snapshots stand, once all have said which."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=True)
    looked(ranks)
    asked = word(ranks)
    sent = {0: 4, 1: 6, 2: 5}
    assert ranks.stood(2, asked, 5, LATER_S, states=[sent]) is None
    assert ranks.stood(0, asked, 4, LATER_S, states=[sent]) is None
    assert ranks.stood(0, 999, 9, LATER_S, states=[sent]) is None, "of no request"
    assert ranks.stood(1, asked, 6, LATER_S, states=[sent]) == sent


def test_standing_in_loops_of_their_own(ranks: Ranks) -> None:
    """What stands for each was not taken at one place: that is no answer, they are asked again."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=True)
    looked(ranks)
    asked = word(ranks)
    assert ranks.stood(0, asked, 4, LATER_S, states=[{0: 4, 1: 5, 2: 5}]) is None
    assert ranks.stood(1, asked, 6, LATER_S, states=[{0: 4, 1: 5, 2: 5}]) is None
    said = ranks.stood(2, asked, 5, LATER_S, states=[{0: 4, 1: 5, 2: 5}])
    assert "each was in a loop that begins anew, and not all in the same one" in str(said)
    assert apart(ranks) == [[4], [6], [5]]
    assert not math.isinf(ranks.due_s())


def test_the_last_one_stands(ranks: Ranks) -> None:
    """It is said, whoever answers last."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=True)
    looked(ranks)
    for rank in (0, 1):
        assert answered(ranks, rank, word(ranks), "a.py:1", LATER_S) is None
    said = ranks.stood(2, word(ranks), 2, LATER_S, states=[])
    assert "was at a.py:1, others in a loop that begins anew" in str(said)


def test_a_newer_request(ranks: Ranks) -> None:
    """Asked to leave while asked to flush: the newer one counts, and only its answers."""
    all_stand(ranks, *NEAR)
    ranks.ask(1, 0.0, leave=False)
    looked(ranks)
    old = word(ranks)
    ranks.ask(2, LATER_S, leave=True)
    assert agreed(ranks) is None
    looked(ranks)
    assert answered(ranks, 0, old, "a", LATER_S) is None
    for rank in range(SIZE):
        assert answered(ranks, rank, word(ranks), "b", LATER_S) is None
    assert (ranks.serial_of(old), ranks.serial_of(word(ranks))) == (1, 2)


def test_news(ranks: Ranks) -> None:
    """What all ranks say is told once."""
    assert ranks.is_news("a")
    assert not ranks.is_news("a")
