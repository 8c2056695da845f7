"""What the ranks sent is a state only together; and they are asked again until they are."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from test_positions import Peer, is_at, upon

from ckptd import wire
from ckptd.supervisor.ranks import Ranks
from ckptd.supervisor.writer import Part


def hello(rank: int, ranks: int) -> wire.Hello:
    return wire.Hello(wire.PROTOCOL, 1, rank, ranks, {})


@pytest.fixture
def two() -> Iterator[Ranks]:
    """Both on this machine."""
    ranks = Ranks()
    for rank in range(2):
        ranks.admit(hello(rank, 2), Peer())
    yield ranks
    ranks.close()


def part(rank: int, place: str, generation: int = 1) -> Part:
    """A snapshot of a rank."""
    snapshot = wire.Snapshot(generation, 7, wire.Place(0, 0), 0, place=place)
    return Part(rank, snapshot, wire.Table([], []), os.open("/dev/null", os.O_RDONLY))


def test_a_state_is_one_of_each(two: Ranks) -> None:
    """In the order of ranks, whoever came first; of an older place nothing will come any more."""
    lost = part(1, "step 6")
    assert two.gather(lost) == (None, [])
    second, first = part(1, "step 7"), part(0, "step 7")
    assert two.gather(second) == (None, [])
    assert two.gather(first) == ([first, second], [lost])


def test_two_places_are_no_state(two: Ranks) -> None:
    """However alike they are; and no more than two of one rank wait for the others'."""
    sent = [part(0, f"step {step}") for step in range(3)]
    dropped = [two.gather(one) for one in sent]
    assert dropped == [(None, []), (None, []), (None, [sent[0]])]
    assert two.gather(part(1, "step 0")) == (None, []), "the other one is given back already"
    other = part(1, "step 2")
    whole, older = two.gather(other)
    assert whole == [sent[2], other]
    assert [one.snapshot.place for one in older] == ["step 1"]


def test_a_rank_that_comes_to_a_place_again(two: Ranks) -> None:
    """Its newer snapshot counts."""
    old, new, other = part(0, "entry", 1), part(0, "entry", 2), part(1, "entry")
    two.gather(old)
    assert two.gather(new) == (None, [old])
    assert two.gather(other) == ([new, other], [])


def answering(ranks: Ranks) -> int:
    """Let all be at one place, be asked, and be told where to answer; the request's word."""
    for worker in ranks:
        is_at(worker, (0, 4))
    ranks.ask(3, 10.0, leave=False)
    ranks.look(ranks.due_s())
    return ranks.page().words[wire.WORD_REQUEST]


def test_who_is_refused() -> None:
    """A rank that is there already, one of another job, and one that can't be."""
    ranks = Ranks()
    assert ranks.refusal(hello(1, 3)) is None
    ranks.admit(hello(1, 3), Peer())
    assert ranks.refusal(hello(0, 3)) is None
    assert "--max-restarts at 0" in (ranks.refusal(hello(1, 3)) or "")
    assert "one of 2 ranks, and one of 3" in (ranks.refusal(hello(0, 2)) or "")
    assert "rank 3 of 3" in (ranks.refusal(hello(3, 3)) or "")
    assert (ranks.missing(), ranks.described()) == ("0, 2", "1 of 3 attached")
    assert not ranks.attached()
    ranks.close()


def test_they_are_told_where_to_answer(two: Ranks) -> None:
    """Not before it is sure that they stand still; then all are told the same."""
    is_at(two.worker(0), (0, 4))
    is_at(two.worker(1), (0, 5))
    two.ask(3, 10.0, leave=True)
    word = two.page().words[wire.WORD_REQUEST]
    assert wire.request_of(word) is wire.Request.LEAVE
    assert two.serial_of(word) == 3
    two.look(10.0)
    assert [upon(two, rank) for rank in range(2)] == [None, None]
    two.look(two.due_s())
    assert [upon(two, rank) for rank in range(2)] == [((0, 6),)] * 2


def test_they_go_on_while_they_are_apart(two: Ranks) -> None:
    """And are asked again a little later, by another word for the same request."""
    is_at(two.worker(0), (0, 4))
    is_at(two.worker(1), (0, 4), (1, 2))
    two.ask(3, 10.0, leave=False)
    word = two.page().words[wire.WORD_REQUEST]
    two.look(two.due_s())
    assert [upon(two, rank) for rank in range(2)] == [(), ()]
    two.look(two.due_s())
    again = two.page().words[wire.WORD_REQUEST]
    assert again != word
    assert two.serial_of(again) == 3
    for _ in range(20):
        two.look(two.due_s())
    assert [upon(two, rank) for rank in range(2)] == [((0, 5),)] * 2, "not for ever"


def test_answers_from_two_places_are_said(two: Ranks) -> None:
    """With both places, and they are asked again."""
    word = answering(two)
    assert two.answered(0, word, "a.py:3 #0, 5 items done", 11.0) is None
    said = two.answered(1, word, "a.py:9 #1, 0 items done", 11.0)
    assert said is not None
    assert "rank 0 was at a.py:3" in said
    assert "rank 1 at a.py:9" in said
    two.look(two.due_s())
    assert two.page().words[wire.WORD_REQUEST] != word


def test_earlier_snapshots_stand_only_together(two: Ranks) -> None:
    """Each rank's own number of it, once all have answered so."""
    word = answering(two)
    assert two.stood(0, word, 8) is None
    assert two.stood(1, word, 9) == {0: 8, 1: 9}
