"""Where ranks on other machines are counts when they have said it; and that machine may be lost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from ckptd import wire
from ckptd.agree import Position
from ckptd.supervisor import ranks as ranks_module
from ckptd.supervisor.ranks import Ranks, Worker


class Peer:
    """A connection, of which is kept what was sent."""

    def __init__(self) -> None:
        self.sent: list[wire.ToWorker] = []

    def pid(self) -> int:
        return 0  # nobody's: nobody here is to be killed

    def send(self, message: wire.ToWorker) -> None:
        self.sent.append(message)

    send_or_drop = send

    def close(self) -> None:
        pass


@pytest.fixture
def three() -> Iterator[Ranks]:
    """One rank here, two elsewhere."""
    ranks = Ranks()
    for rank in range(3):
        hello = wire.Hello(wire.PROTOCOL, 1, rank, 3, {}, remote=rank > 0)
        ranks.admit(hello, Peer())
    yield ranks
    ranks.close()


def is_at(worker: Worker | None, *position: tuple[int, int]) -> None:
    """Let its page show that."""
    assert worker is not None
    worker.page.words[wire.WORD_DEPTH] = len(position)
    for level, (ordinal, done) in enumerate(position):
        slot = wire.WORD_LOOPS + wire.LOOP_WORDS * level
        worker.page.words[slot], worker.page.words[slot + 3] = done, ordinal


def sent(ranks: Ranks, rank: int) -> list[wire.ToWorker]:
    return ranks.worker(rank).peer.sent


def upon(ranks: Ranks, rank: int) -> Position | None:
    """Upon what was agreed with a rank."""
    page = ranks.worker(rank).page
    return page.agreed(page.words[wire.WORD_REQUEST])


def test_all_that_are_elsewhere_are_waited_for(three: Ranks) -> None:
    """What a page here shows of them is old: it decides nothing."""
    is_at(three.worker(0), (0, 4))
    for rank in (1, 2):
        is_at(three.worker(rank), (0, 3))
    three.ask(1, 0.0, leave=False)
    word = three.page().words[wire.WORD_REQUEST]
    assert [sent(three, rank) for rank in range(3)] == [[], [wire.Asked(word)], [wire.Asked(word)]]
    three.look(three.due_s())
    three.seen(1, wire.Seen(word, ((0, 5),)), 0.1)
    three.look(three.due_s())
    assert upon(three, 0) is None
    three.seen(2, wire.Seen(word, ((0, 7),)), 0.2)
    assert three.due_s() == 0.2
    three.look(0.2)
    for rank in range(3):
        assert upon(three, rank) == ((0, 8),)
    assert sent(three, 2)[1:] == [wire.Agreed(word, ((0, 8),))]
    assert math.isinf(three.due_s())


def test_what_was_said_before_is_old(three: Ranks) -> None:
    """An answer to an earlier request is none to this one."""
    for rank in range(3):
        is_at(three.worker(rank), (0, 4))
    three.ask(1, 0.0, leave=False)
    first = three.page().words[wire.WORD_REQUEST]
    three.ask(2, 0.0, leave=True)
    for rank in (1, 2):
        three.seen(rank, wire.Seen(first, ((0, 4),)), 0.1)
    three.look(0.2)
    assert upon(three, 0) is None


def test_they_are_not_waited_for_without_end(three: Ranks) -> None:
    """All go on, before those that stand still lose patience, and are asked again."""
    is_at(three.worker(0), (0, 4))
    three.ask(1, 0.0, leave=False)
    word = three.page().words[wire.WORD_REQUEST]
    three.seen(1, wire.Seen(word, ((0, 4),)), 0.1)
    three.look(1.0)
    assert three.due_s() == ranks_module._SAY_S < 10
    three.look(three.due_s())
    assert upon(three, 0) == ()
    assert sent(three, 1)[1:] == sent(three, 2)[1:] == [wire.Agreed(word, None)]
    three.seen(2, wire.Seen(word, ((0, 4),)), three.due_s() - 0.01)  # too late
    three.look(three.due_s())
    assert three.page().words[wire.WORD_REQUEST] > word
    assert isinstance(sent(three, 2)[-1], wire.Asked)


def test_a_single_process_elsewhere_is_asked() -> None:
    """The request goes to it."""
    ranks = Ranks()
    ranks.admit(wire.Hello(wire.PROTOCOL, 1, 0, 1, {}, remote=True), Peer())
    ranks.ask(3, 0.0, leave=True)
    assert sent(ranks, 0) == [wire.Asked(wire.request_word(3, wire.Request.LEAVE))]
    ranks.close()


def test_it_is_killed_there(three: Ranks) -> None:
    """It is told once; gone is it when its connection ends, or its machine does not answer."""
    here, there, _ = three
    for now_s in (5.0, 5.1):
        for worker in three:
            worker.kill(now_s)
    assert here.peer.sent == []
    assert there.peer.sent == [wire.Kill()]
    assert here.is_gone(5.1)
    assert not there.is_gone(5.0 + ranks_module._ANSWERS_WITHIN_S)
    assert there.is_gone(5.2 + ranks_module._ANSWERS_WITHIN_S)
    there.killed_s, there.peer = math.inf, None
    assert there.is_gone(0.0)


def test_it_is_no_process_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has its number here is somebody else, and is not killed for it."""
    looked_for = []

    class Strangers:
        """Finds nobody."""

        @staticmethod
        def of(pid: int) -> None:
            looked_for.append(pid)

    monkeypatch.setattr(ranks_module, "Stranger", Strangers)
    ranks = Ranks()
    for rank in range(3):
        ranks.admit(wire.Hello(wire.PROTOCOL, 7, rank, 3, {}, remote=rank > 0), Peer())
    assert looked_for == [0]
    ranks.close()
