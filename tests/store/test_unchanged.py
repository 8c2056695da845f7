"""Files that did not change are written once, and no checkpoint depends on another."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest

from ckptd.errors import DamagedError
from ckptd.host.disk import Content, RealDisk
from ckptd.store import store

FROZEN = random.Random(5).randbytes(100_000)


class CountingDisk(RealDisk):
    """Counts the bytes that are written."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, path: Path, content: Content) -> None:
        self.written += len(content)
        super().write(path, content)


def publish(checkpoints: Path, step: int, disk: RealDisk | None = None, **files: bytes) -> Path:
    """Publish a state of which one file never changes."""
    content = {"state.json": b"{}", "frozen": FROZEN, "trained": b"%d" % step * 100, **files}
    done = store.publish(
        disk or RealDisk(),
        checkpoints,
        step=step,
        attempt=1,
        files=content,
        outputs=(),
        created=0.0,
        fence=lambda: None,
    )
    assert all((done.path / name).read_bytes() == text for name, text in content.items())
    store.verify(RealDisk(), done.path)
    return done.path


def inode(path: Path) -> int:
    return (path / "frozen").stat().st_ino


def test_unchanged_content_is_written_twice_and_no_more(tmp_path: Path) -> None:
    """Of a file that never changes there are two copies, which checkpoints use in turn."""
    disk = CountingDisk()
    paths = [publish(tmp_path / "c", step, disk) for step in range(6)]
    assert disk.written < 2 * len(FROZEN) + 6 * 2000
    assert len({inode(path) for path in paths}) == 2
    for older, newer in itertools.pairwise(paths):
        assert inode(older) != inode(newer), "damage to one would damage the next older one"


def test_any_checkpoint_may_be_deleted(tmp_path: Path) -> None:
    """Whichever is deleted, the others are whole."""
    for gone in range(5):
        checkpoints = tmp_path / str(gone)
        paths = [publish(checkpoints, step) for step in range(5)]
        shutil.rmtree(paths.pop(gone))
        for path in paths:
            store.verify(RealDisk(), path)


@pytest.mark.parametrize("gone", [1, 2, 3, 4])
def test_neighbours_share_nothing_after_a_deletion(tmp_path: Path, gone: int) -> None:
    """Whichever was deleted, what is published afterwards shares no file with the one before it."""
    paths = [publish(tmp_path / "c", step) for step in range(5)]
    shutil.rmtree(paths.pop(gone))
    paths += [publish(tmp_path / "c", step) for step in (5, 6, 7)]
    for older, newer in itertools.pairwise(paths[3:]):
        assert inode(older) != inode(newer)


def test_one_flipped_bit_after_a_deletion(tmp_path: Path) -> None:
    """One of three was deleted by hand: one bit still costs no more than one checkpoint and those
    that share with it, and the next older one is used."""
    paths = [publish(tmp_path / "c", step) for step in (1, 2, 3)]
    shutil.rmtree(paths[1])
    paths += [publish(tmp_path / "c", step) for step in (4, 5)]
    damaged = bytearray(FROZEN)
    damaged[70_001] ^= 4
    (paths[-1] / "frozen").write_bytes(damaged)
    found, set_aside = store.newest(RealDisk(), tmp_path / "c")
    assert found is not None
    assert (found.step, len(set_aside)) == (4, 1)


def test_a_lower_step_shares_with_no_neighbour(tmp_path: Path) -> None:
    """What is published between two others shares a file with neither."""
    inodes = {step: inode(publish(tmp_path / "c", step)) for step in (10, 20, 30, 40, 35)}
    assert inodes[35] not in (inodes[30], inodes[40])


def test_damage_is_not_handed_on(tmp_path: Path) -> None:
    """A file that was damaged on the disk is written anew, not linked."""
    paths = [publish(tmp_path / "c", step) for step in (1, 2)]
    damaged = bytearray(FROZEN)
    damaged[70_001] ^= 4  # where no sampled piece lies
    (paths[0] / "frozen").write_bytes(damaged)
    path = publish(tmp_path / "c", 3)
    assert inode(path) != inode(paths[0])
    with pytest.raises(DamagedError):
        store.verify(RealDisk(), paths[0])


@pytest.mark.parametrize("at", [0, 50_000, 70_001, 99_999])
def test_one_changed_byte_is_a_change(tmp_path: Path, at: int) -> None:
    """Wherever a byte changed, what is read back is the new content."""
    for step in (1, 2):
        publish(tmp_path / "c", step)
    changed = bytearray(FROZEN)
    changed[at] ^= 1
    path = publish(tmp_path / "c", 3, frozen=bytes(changed))
    assert (path / "frozen").read_bytes() == changed


def test_a_longer_file_is_a_change(tmp_path: Path) -> None:
    """So is a file that lost its end."""
    for step in (1, 2):
        publish(tmp_path / "c", step)
    for step, content in ((3, FROZEN + b"x"), (4, FROZEN[:-1]), (5, b"")):
        publish(tmp_path / "c", step, frozen=content)


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There everything is written each time."""

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    paths = [publish(tmp_path / "c", step) for step in range(4)]
    assert len({inode(path) for path in paths}) == 4


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link to the same content does not become part of a checkpoint."""
    paths = [publish(tmp_path / "c", step) for step in (1, 2)]
    (tmp_path / "elsewhere").write_bytes(FROZEN)
    (paths[0] / "frozen").unlink()
    (paths[0] / "frozen").symlink_to(tmp_path / "elsewhere")
    path = publish(tmp_path / "c", 3)
    assert not (path / "frozen").is_symlink()
    assert inode(path) not in (inode(paths[1]), (tmp_path / "elsewhere").stat().st_ino)
