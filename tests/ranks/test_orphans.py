"""Ranks whose supervisor is gone agree and save together, through files in the run's directory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from ckptd import agree, wire
from ckptd.errors import SilentRanksError
from ckptd.host.disk import RealDisk
from ckptd.worker import orphans
from ckptd.worker.orphans import Orphans, Told

T = TypeVar("T")

PLACE = wire.Place(0, 4)


def at(*position: tuple[int, int]) -> wire.StatusPage:
    """The page of a rank that is somewhere."""
    page = wire.StatusPage(memoryview(bytearray(wire.PAGE_BYTES)))
    page.words[wire.WORD_DEPTH] = len(position)
    for level, (ordinal, done) in enumerate(position):
        slot = wire.WORD_LOOPS + wire.LOOP_WORDS * level
        page.words[slot], page.words[slot + 3] = done, ordinal
    return page


def several(run: Path, ranks: int) -> list[Orphans]:
    return [Orphans(RealDisk(), run, 1, rank, ranks) for rank in range(ranks)]


def at_once(tasks: list[Callable[[], T]]) -> list[T]:
    """What each task returns, all of them running at the same time."""
    results: dict[int, T] = {}

    def run(number: int, task: Callable[[], T]) -> None:
        results[number] = task()

    threads = [threading.Thread(target=run, args=one) for one in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(tasks))]


def agreed(page: wire.StatusPage, one: Orphans) -> tuple[tuple[int, int], ...]:
    """Upon what a rank has agreed, once it has."""
    one._go_round(page)
    return page.agreed(page.words[wire.WORD_REQUEST]) or ()


def test_all_agree_upon_the_same(tmp_path: Path) -> None:
    """The end of the item in which the furthest rank is, decided by each for itself."""
    pages = [at((0, 2), (0, 7)), at((0, 2), (0, 8)), at((0, 2), (0, 7))]
    pairs = list(zip(pages, several(tmp_path, 3), strict=True))
    found = at_once([lambda page=page, one=one: agreed(page, one) for page, one in pairs])
    assert found == [((0, 2), (0, 9))] * 3
    words = {page.words[wire.WORD_REQUEST] for page in pages}
    assert words == {orphans.word_of(0)}
    assert wire.request_of(words.pop()) is wire.Request.ORPHANED


def test_they_ask_again_while_they_are_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two loops, or one in a loop that the other does not have: a little later, and in the
    end at the end of an outer item."""
    monkeypatch.setattr(orphans, "_PAUSE_S", 0.0)
    pages = [at((0, 2)), at((0, 2), (1, 5))]
    pairs = list(zip(pages, several(tmp_path, 2), strict=True))
    found = at_once([lambda page=page, one=one: agreed(page, one) for page, one in pairs])
    assert found == [((0, 3),)] * 2
    assert {page.words[wire.WORD_REQUEST] for page in pages} == {
        orphans.word_of(agree.PATIENT_TRIES)
    }


def test_a_silent_rank_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and the training is told (it may not stand still at every safe point)."""
    monkeypatch.setattr(orphans, "_AGREE_WITHIN_S", 0.1)
    first, *_ = several(tmp_path, 3)
    first._agree(at((0, 1)))
    assert first.failed is not None
    assert "rank 1, 2 did not answer" in first.failed


def test_snapshots_come_to_the_first_rank(tmp_path: Path) -> None:
    """With what they were told to be, and it says what became of them."""
    first, second = several(tmp_path, 2)
    told = Told(7, "item 7", PLACE)

    def lead() -> bytes:
        ((rank, (other, path)),) = first.snapshots(told).items()
        assert (rank, other) == (1, told)
        content = path.read_bytes()
        RealDisk().remove_tree(path.parent)  # as publishing does
        first.tell_outcome("")
        return content

    def follow() -> bytes:
        second.leave_snapshot(told, memoryview(b"bits"))
        second.check_outcome()
        return b"durable"

    assert at_once([lead, follow]) == [b"bits", b"durable"]


def test_snapshots_of_two_places_are_none(tmp_path: Path) -> None:
    """They are not published, and both are named."""
    first, second = several(tmp_path, 2)
    second.leave_snapshot(Told(7, "item 7", PLACE), memoryview(b"bits"))
    with pytest.raises(SilentRanksError, match="rank 1 was at item 7, rank 0 at item 8"):
        first.snapshots(Told(8, "item 8", PLACE))
    first.tell_outcome("no room")
    with pytest.raises(SilentRanksError, match="no room"):
        second.check_outcome()
