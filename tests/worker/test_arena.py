"""A snapshot's memory is used again only when the supervisor has let go of it."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.host import memory
from ckptd.worker import arena as arena_module
from ckptd.worker.arena import Arena, Arenas


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much memory as anyone wants."""
    monkeypatch.setattr(memory, "available", lambda: 2**50)


def test_never_what_the_supervisor_reads() -> None:
    """While a snapshot is in the supervisor's hands the next one lies elsewhere."""
    arenas = Arenas()
    first = arenas.take(100)
    arenas.sent(1, first)
    arenas.let_go(first)
    second = arenas.take(100)
    assert second is not first
    first.mapping[:5] = b"first"
    second.mapping[:5] = b"other"
    assert first.mapping[:5] == b"first"


def test_used_again() -> None:
    """When the supervisor has let go, the same memory is taken, and no more than two are kept."""
    arenas = Arenas()
    seen = set()
    for generation in range(1, 20):
        arena = arenas.take(100)
        seen.add(id(arena))
        arenas.sent(generation, arena)
        arenas.let_go(arena)
        if generation > 1:
            arenas.released(generation - 1)
    assert len(seen) == 2


def test_kept_by_the_worker() -> None:
    """A snapshot that the worker keeps for itself is not written over either."""
    arenas = Arenas()
    standing = arenas.take(100)
    arenas.sent(1, standing)
    arenas.released(1)
    assert arenas.take(100) is not standing
    arenas.let_go(standing)
    assert arenas.take(100) is standing


def test_a_third_is_for_one_use() -> None:
    """With two in the supervisor's hands a third one serves, and is given back to the system."""
    arenas = Arenas()
    taken = [arenas.take(100) for _ in range(3)]
    for generation, arena in enumerate(taken, start=1):
        arenas.sent(generation, arena)
        arenas.let_go(arena)
    arenas.released(3)
    assert taken[2].mapping.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(taken[2].descriptor)
    arenas.released(1)
    assert not taken[0].mapping.closed


def test_outgrown() -> None:
    """A memory that has become too small is given back, and a larger one is made."""
    arenas = Arenas()
    small = arenas.take(100)
    arenas.let_go(small)
    large = arenas.take(10_000)
    assert large.length >= 10_000
    assert small.mapping.closed


def test_not_kept_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where as much is not free beside it, a memory is given back at once."""
    arenas = Arenas()
    arena = arenas.take(100)
    monkeypatch.setattr(memory, "available", lambda: 99)
    arenas.let_go(arena)
    assert arena.mapping.closed


def test_unknown_release() -> None:
    """A release of what is not held changes nothing."""
    Arenas().released(7)


def test_short_memory_is_asked_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is not memory for another snapshot, the supervisor is asked, and its is used."""
    arenas, asked = Arenas(), []
    first = arenas.take(5000)
    arenas.sent(1, first)
    arenas.let_go(first)
    monkeypatch.setattr(memory, "available", lambda: 4999)

    def gives_back(needed: int, available: int) -> None:
        asked.append((needed, available))
        threading.Thread(target=arenas.released, args=(1,)).start()

    arenas.on_short = gives_back
    monkeypatch.setattr(Arenas, "_worth_keeping", lambda *_: True)
    assert arenas.take(5000) is first
    assert asked == [(5000, 4999)]


def test_short_memory_that_nobody_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written can't be given back: the snapshot is tried without."""
    monkeypatch.setattr(arena_module, "_GIVEN_BACK_WITHIN_S", 0.0)
    monkeypatch.setattr(memory, "available", lambda: 0)
    arenas, asked = Arenas(), []
    arenas.on_short = lambda *words: asked.append(words)
    first = arenas.take(5000)
    assert arenas.take(5000) is not first
    assert asked == [(5000, 0)] * 2


def test_no_memory_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It lies in a file without a name, which is given back to the disk after one use."""
    monkeypatch.setattr(memory, "available", lambda: 0)
    arenas, said = Arenas(), []
    arenas.on_short = lambda *_: None
    arenas.directory, arenas.on_spilled = tmp_path, said.append
    first = arenas.take(50_000)
    assert os.fstat(first.descriptor).st_dev == tmp_path.stat().st_dev
    assert os.fstat(first.descriptor).st_blocks * 512 >= 50_000, "its room is not reserved"
    assert list(tmp_path.iterdir()) == []
    first.mapping[-1:] = b"x"
    arenas.let_go(first)
    assert first.mapping.closed
    assert said == [None]


def test_neither_memory_nor_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the disk refuses too is tried in memory, and said."""
    monkeypatch.setattr(memory, "available", lambda: 0)
    arenas, said = Arenas(), []
    arenas.directory, arenas.on_spilled = tmp_path / "gone", said.append
    arenas.let_go(arenas.take(5000))
    (refused,) = said
    assert isinstance(refused, FileNotFoundError)


def in_a_fork(act: Callable[[], object]) -> int:
    """Do something in a forked child; how it ended, 0 when it was done."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_has_no_part_in_it() -> None:
    """A loader worker can't write into a snapshot, by whatever address it has got hold of."""
    arena = Arena(10_000)
    arena.mapping[:4] = b"mine"
    assert in_a_fork(lambda: ctypes.memset(arena.address, 7, 4)) == -signal.SIGSEGV
    assert in_a_fork(lambda: arena.mapping.find(b"m")) == -signal.SIGSEGV
    assert arena.mapping[:4] == b"mine"
    arena.close()


def test_a_forked_process_keeps_its_own_memory() -> None:
    """Where a snapshot was, nothing of a child's own comes to lie that would go with it."""
    arena = Arena(8 << 20)

    def forgets() -> None:
        others = [mmap.mmap(-1, 8 << 20) for _ in range(20)]
        others += [mmap.mmap(-1, 4096) for _ in range(200)]
        arena.mapping.close()
        for other in others:
            other[0] = 1
            assert other[-1] == 0

    assert in_a_fork(forgets) == 0
    arena.close()
