"""One suite on the real disk and on the simulated one: the fake is as strict as the real one."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
from pathlib import Path

import pytest
from simulated import Fault, PowerCut, SimulatedDisk

from ckptd.host import disk as disks
from ckptd.host.disk import Disk, RealDisk


@pytest.fixture(params=[RealDisk, SimulatedDisk])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return RealDisk() if request.param is RealDisk else SimulatedDisk(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"a", bytes(range(256)) * 99, bytearray(b"ab"), memoryview(b"abc")]
)
def test_what_was_written_is_read(disk: Disk, tmp_path: Path, content: bytes) -> None:
    """A file has the content and the length that it was written with."""
    disk.write(tmp_path / "f", content)
    disk.sync(tmp_path / "f")
    assert bytes(disk.read(tmp_path / "f")) == bytes(content)
    assert disk.size(tmp_path / "f") == len(content)


def test_pieces(disk: Disk, tmp_path: Path) -> None:
    """Pieces are the file's own bytes; at its end there are fewer."""
    disk.write(tmp_path / "f", b"0123456789")
    assert disk.pieces(tmp_path / "f", [0, 4, 8], 3) == [b"012", b"456", b"89"]
    with pytest.raises(FileNotFoundError):
        disk.pieces(tmp_path / "g", [0], 3)


def test_creation_is_exclusive(disk: Disk, tmp_path: Path) -> None:
    """Neither a file nor a directory is made where something is already."""
    disk.write(tmp_path / "f", b"old")
    disk.make_directory(tmp_path / "d")
    for make in (
        lambda: disk.write(tmp_path / "f", b"new"),
        lambda: disk.write(tmp_path / "d", b"new"),
        lambda: disk.make_directory(tmp_path / "f"),
        lambda: disk.make_directory(tmp_path / "d"),
    ):
        with pytest.raises(FileExistsError):
            make()
    assert bytes(disk.read(tmp_path / "f")) == b"old"


def test_a_missing_parent_is_an_error(disk: Disk, tmp_path: Path) -> None:
    """Nothing is made in a directory that is not there."""
    with pytest.raises(FileNotFoundError):
        disk.write(tmp_path / "none" / "f", b"")
    with pytest.raises(FileNotFoundError):
        disk.make_directory(tmp_path / "none" / "d")


def test_what_is_missing_is_an_error(disk: Disk, tmp_path: Path) -> None:
    """All but `names` raise for a path that is not there; the error carries the path."""
    path = tmp_path / "none"
    for operation in (
        *(disk.sync, disk.sync_directory, disk.remove, disk.remove_tree, disk.size, disk.read),
        *(disk.identity, lambda path: list(disk.stream(path))),
        lambda path: disk.rename(path, tmp_path / "other"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            operation(path)
        assert str(caught.value.filename) == str(path)
    assert disk.names(path) == []


def test_names_are_sorted(disk: Disk, tmp_path: Path) -> None:
    """`names` lists files and directories, sorted, hidden ones too."""
    for name in ("b", ".a", "c"):
        disk.write(tmp_path / name, b"")
    disk.make_directory(tmp_path / "a")
    disk.sync_directory(tmp_path)
    assert disk.names(tmp_path) == [".a", "a", "b", "c"]


def test_the_names_in_a_file_are_an_error(disk: Disk, tmp_path: Path) -> None:
    """A file has no names in it, and is no parent."""
    disk.write(tmp_path / "f", b"")
    with pytest.raises(NotADirectoryError):
        disk.names(tmp_path / "f")
    with pytest.raises(NotADirectoryError):
        disk.write(tmp_path / "f" / "g", b"")


def test_a_directory_moves_with_what_is_in_it(disk: Disk, tmp_path: Path) -> None:
    """After a rename the old name is gone and the new one has everything."""
    disk.make_directory(tmp_path / "a")
    disk.write(tmp_path / "a" / "f", b"x")
    disk.rename(tmp_path / "a", tmp_path / "b")
    assert disk.names(tmp_path) == ["b"]
    assert bytes(disk.read(tmp_path / "b" / "f")) == b"x"


def test_a_rename_replaces_no_full_directory(disk: Disk, tmp_path: Path) -> None:
    """A directory replaces an empty one, never one with something in it, never a file."""
    for name in ("new", "full", "empty"):
        disk.make_directory(tmp_path / name)
    disk.write(tmp_path / "full" / "f", b"x")
    disk.write(tmp_path / "file", b"x")
    for target in ("full", "file"):
        with pytest.raises(OSError, match=r"."):
            disk.rename(tmp_path / "new", tmp_path / target)
    disk.rename(tmp_path / "new", tmp_path / "empty")
    assert disk.names(tmp_path) == ["empty", "file", "full"]


def test_a_file_replaces_a_file_and_no_directory(disk: Disk, tmp_path: Path) -> None:
    """Renaming a file onto another replaces it; onto a directory it is refused."""
    disk.write(tmp_path / "a", b"a")
    disk.write(tmp_path / "b", b"b")
    disk.make_directory(tmp_path / "d")
    with pytest.raises(IsADirectoryError):
        disk.rename(tmp_path / "a", tmp_path / "d")
    disk.rename(tmp_path / "a", tmp_path / "b")
    assert bytes(disk.read(tmp_path / "b")) == b"a"


def test_removal(disk: Disk, tmp_path: Path) -> None:
    """`remove` takes a file and no directory; `remove_tree` whatever is there."""
    disk.make_directory(tmp_path / "d")
    disk.make_directory(tmp_path / "d" / "e")
    disk.write(tmp_path / "d" / "e" / "f", b"")
    disk.write(tmp_path / "f", b"")
    with pytest.raises(OSError, match="d"):
        disk.remove(tmp_path / "d")
    disk.write(tmp_path / "g", b"")
    disk.remove_tree(tmp_path / "g")
    disk.remove_tree(tmp_path / "d")
    disk.remove(tmp_path / "f")
    assert disk.names(tmp_path) == []


def test_the_real_disk_removes_links_and_pipes(tmp_path: Path) -> None:
    """`remove_tree` removes a link or a pipe itself; what a link points to stays."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x")
    for name, target in (("link", "d"), ("dangling", "none"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "loop", "pipe"):
        RealDisk().remove_tree(tmp_path / name)
    assert RealDisk().names(tmp_path) == ["d"]
    assert RealDisk().names(tmp_path / "d") == ["f"]


def test_identity(disk: Disk, tmp_path: Path) -> None:
    """The names of one file have one identity, another file of the same content has another; a
    renamed file keeps its own."""
    disk.write(tmp_path / "a", b"x")
    disk.write(tmp_path / "b", b"x")
    assert disk.link(tmp_path / "a", tmp_path / "c")
    own = disk.identity(tmp_path / "a")
    assert own == disk.identity(tmp_path / "c") != disk.identity(tmp_path / "b")
    disk.rename(tmp_path / "a", tmp_path / "d")
    assert disk.identity(tmp_path / "d") == own


@pytest.mark.parametrize("length", [0, 1, 16, 17, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_a_stream_is_the_content(disk: Disk, tmp_path: Path, length: int) -> None:
    """The pieces of a stream, one after the other, are what `read` finds."""
    content = bytes(at >> 12 & 255 for at in range(length))
    disk.write(tmp_path / "f", content)
    assert b"".join(map(bytes, disk.stream(tmp_path / "f"))) == content


def test_a_stream_on_an_old_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel that does not know how to bring a mapping into memory: the same content."""
    content = bytes(at >> 12 & 255 for at in range((5 << 20) + 3))
    RealDisk().write(tmp_path / "f", content)
    monkeypatch.setattr(disks, "_MADV_POPULATE_READ", 999)
    assert b"".join(map(bytes, RealDisk().stream(tmp_path / "f"))) == content
    assert bytes(RealDisk().read(tmp_path / "f")) == content


def test_a_stream_that_is_left_lets_go(tmp_path: Path) -> None:
    """Whoever stops in the middle leaves no descriptor and no mapping behind."""
    RealDisk().write(tmp_path / "f", bytes(9 << 20))

    def held() -> int:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").count(str(tmp_path))
        open_ = [os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()]
        return maps + sum(path.startswith(str(tmp_path)) for path in open_)

    for piece in RealDisk().stream(tmp_path / "f"):
        assert len(piece) < 9 << 20
        assert held() > 0
        break
    gc.collect()
    assert held() == 0


def test_only_regular_files_are_read(disk: Disk, tmp_path: Path) -> None:
    """A directory is no file: not for `size`, not for `read`, not for `stream`."""
    disk.make_directory(tmp_path / "d")
    for operation in (disk.size, disk.read, lambda path: list(disk.stream(path))):
        with pytest.raises(OSError, match="not a regular file"):
            operation(tmp_path / "d")


def test_the_real_disk_follows_no_link_and_opens_no_pipe(tmp_path: Path) -> None:
    """A symbolic link is neither read nor written through; a pipe does not block."""
    disk = RealDisk()
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        for operation in (disk.size, disk.read, lambda path: list(disk.stream(path))):
            with pytest.raises(OSError, match=r"."):
                operation(tmp_path / name)
    with pytest.raises(FileExistsError):
        disk.write(tmp_path / "dangling", b"x")
    assert not (tmp_path / "none").exists()


def test_what_is_synced_survives(tmp_path: Path) -> None:
    """A synced file in synced directories is on every surviving disk, and only there."""
    disk = SimulatedDisk(tmp_path)
    disk.make_directory(tmp_path / "d")
    disk.write(tmp_path / "d" / "f", b"1234")
    found = {survivor.fingerprint() for survivor in disk.survivors(0)}
    assert found == {
        (),
        (("d", ()),),
        *((("d", (("f", content),)),) for content in (b"1234", b"12", b"")),
    }
    disk.sync(tmp_path / "d" / "f")
    disk.sync_directory(tmp_path / "d")
    assert {s.fingerprint() for s in disk.survivors(0)} == {(), (("d", (("f", b"1234"),)),)}
    disk.sync_directory(tmp_path)
    assert {s.fingerprint() for s in disk.survivors(0)} == {(("d", (("f", b"1234"),)),)}


def test_an_unsynced_rename_and_removal_may_be_undone(tmp_path: Path) -> None:
    """Each change of an entry may be lost by itself until its directory is synced."""
    disk = SimulatedDisk(tmp_path)
    disk.write(tmp_path / "a", b"")
    disk.write(tmp_path / "b", b"")
    disk.sync_directory(tmp_path)
    disk.rename(tmp_path / "a", tmp_path / "c")
    disk.remove(tmp_path / "b")
    found = {tuple(survivor.names(tmp_path)) for survivor in disk.survivors(0)}
    assert found == {("a", "b"), ("b", "c"), ("a",), ("c",)}


def test_too_many_survivors_are_chosen_from_by_seed(tmp_path: Path) -> None:
    """Above the limit the choice is bounded, repeatable, and holds both extremes."""
    disk = SimulatedDisk(tmp_path)
    for i in range(40):
        disk.write(tmp_path / f"{i:02}", b"xx")
    first, again, other = ([s.fingerprint() for s in disk.survivors(seed)] for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 300
    assert disk.fingerprint() in first
    assert () in first


@pytest.mark.parametrize("how", ["once", "ever", "cut", "cut within"])
def test_faults_strike_where_they_should(tmp_path: Path, how: str) -> None:
    """The n-th operation ends as asked; half a write is left unless the cut comes before it."""
    disk = SimulatedDisk(tmp_path, Fault(2, how))
    disk.write(tmp_path / "a", b"12")
    with pytest.raises(PowerCut if "cut" in how else OSError):
        disk.write(tmp_path / "b", b"12")
    left = disk.copy()
    assert left.names(tmp_path) == (["a"] if how == "cut" else ["a", "b"])
    assert how == "cut" or left.read(tmp_path / "b") == b"1"
    if how == "once":
        assert disk.size(tmp_path / "a") == 2
    else:
        with pytest.raises(PowerCut if "cut" in how else OSError):
            disk.size(tmp_path / "a")


# ------------------------------------------------------------------ past the page cache

SIZES = [1 << 20, (1 << 20) + 1, (17 << 20) + 4095, (33 << 20) + 4096]


@pytest.fixture(scope="module")
def memory() -> mmap.mmap:
    """Memory as snapshots lie in it, filled so that each block is another."""
    length = max(SIZES) + 4096
    mapping = mmap.mmap(-1, length)
    for at in range(0, length, 4096):
        mapping[at : at + 8] = at.to_bytes(8, "little")
    return mapping


@pytest.fixture
def direct_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets at which anything was written past the page cache."""
    offsets: list[int] = []
    pwrite = os.pwrite

    def noted(descriptor: int, content: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            offsets.append(offset)
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    return offsets


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("start", [0, 4096, 100], ids=["aligned", "second block", "not aligned"])
def test_large_content(
    memory: mmap.mmap, direct_writes: list[int], tmp_path: Path, start: int, length: int
) -> None:
    """Large content arrives whole, whether or not the file system takes it directly."""
    with memoryview(memory)[start : start + length] as content:
        RealDisk().write(tmp_path / "large", content)
        assert (tmp_path / "large").read_bytes() == content
    if start % 4096 == 0 and _takes_direct(tmp_path):
        assert min(direct_writes) == 0
        assert len(direct_writes) >= -(-(length - 4095) // (16 << 20))


def test_small_content_is_not_direct(direct_writes: list[int], tmp_path: Path) -> None:
    """What is small goes through the page cache: blocks would cost more than they spare."""
    RealDisk().write(tmp_path / "small", b"x" * 5000)
    assert not direct_writes


REFUSALS = [errno.EINVAL, errno.EOPNOTSUPP]


@pytest.mark.parametrize("code", REFUSALS)
def test_refused_at_once(
    memory: mmap.mmap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    """A file system that opens no file for direct writes gets every byte."""
    opened = os.open

    def refuses(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, "refused")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuses)
    with memoryview(memory)[: 2 << 20] as content:
        RealDisk().write(tmp_path / "large", content)
        assert (tmp_path / "large").read_bytes() == content


@pytest.mark.parametrize("first", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize("code", REFUSALS)
def test_refused_in_the_middle(
    memory: mmap.mmap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, first: int
) -> None:
    """A file system that refuses direct writes late still gets every byte."""
    pwrite = os.pwrite

    def refuses(descriptor: int, content: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and offset >= first:
            raise OSError(code, "refused")
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", refuses)
    with memoryview(memory)[: 33 << 20] as content:
        RealDisk().write(tmp_path / "large", content)
        assert (tmp_path / "large").read_bytes() == content


def test_direct_failure_is_raised(
    memory: mmap.mmap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A full disk is said, also when one of several threads met it."""

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        if offset >= 16 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(content)

    monkeypatch.setattr(os, "pwrite", full)
    with memoryview(memory)[: 33 << 20] as content, pytest.raises(OSError, match="No space"):
        RealDisk().write(tmp_path / "large", content)


def _takes_direct(path: Path) -> bool:
    probe = path / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
