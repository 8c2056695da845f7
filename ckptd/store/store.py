"""Publish, find, verify and drop checkpoints.

Rules (FORMAT.md has them as invariants of what is on the disk):

1. A directory with a checkpoint's name is whole: it got its name by a rename, after everything in
   it was synced.
2. Nothing is dropped before something newer is durable.
3. What was read was verified: every file's length and sum are those of the manifest.
4. What is damaged is set aside under another name and kept; the next older one is used. So is
   what was passed over: a job that went on from an older checkpoint publishes lower steps, and the
   higher ones that it did not go on from must not be found again.
5. A failing operation leaves what was there before as it was.
6. A file that did not change is not written again: it gets a second name, for that of the second
   next older checkpoint; but never where the next older or the next newer one has that very file,
   as it has after one in between was deleted. So damage to a checkpoint leaves the next older one
   sound. Before that it is read and its sum compared, so that damage is not handed on. A file of
   one rank that is the same as rank 0's of that name is a second name for that one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ckptd.errors import DamagedError, NotDurableError
from ckptd.host.disk import Content, Disk
from ckptd.store import fence as fences
from ckptd.store import manifest as manifests
from ckptd.store import retention
from ckptd.store.manifest import File, Manifest

#: There is something else in the place of a file or a directory, or nothing.
_NOT_THERE: Final = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}
_PIECES: Final = 64
_PIECE_BYTES: Final = 512


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is durable."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Items of innermost loops that were done."""
        return self.manifest.step


@dataclass(frozen=True)
class SetAside:
    """A damaged checkpoint: where it is kept now, and what is wrong with it."""

    path: Path
    why: str


@dataclass(frozen=True)
class _Earlier:
    """The checkpoint whose files may serve again, and those beside the new one (rule 6)."""

    path: Path
    manifest: Manifest
    neighbours: list[Path]


@dataclass(frozen=True)
class Listed:
    """A checkpoint in a listing; what an unreadable manifest would say is -1."""

    path: Path
    step: int
    attempt: int
    length: int
    created: float
    state: str


def publish(
    disk: Disk,
    checkpoints: Path,
    *,
    step: int,
    attempt: int,
    files: Mapping[str, Content],
    outputs: Iterable[Path],
    created: float,
    fence: Callable[[], None],
) -> Checkpoint:
    """Make a checkpoint durable. When this returns, no crash and no power cut can lose it.

    Args:
        disk: where to.
        checkpoints: the directory of all checkpoints of the run; created when missing.
        step: items of innermost loops that are done.
        attempt: this attempt's number.
        files: content by file name.
        outputs: files elsewhere whose length the checkpoint counts on; synced before it.
        created: seconds since 1970, a label for people.
        fence: called right before the checkpoint becomes visible; raises FencedError when this
            attempt may not publish any more.

    Raises:
        NotDurableError: the disk refused; says what it was asked and what for.
        FencedError: from `fence`.
    """
    total = sum(len(memoryview(content).cast("B")) for content in files.values())
    try:
        for output in outputs:
            # After a power cut an output must be at least as long as the checkpoint says.
            _sync_if_there(disk, output)
        _prepare(disk, checkpoints)
        names = disk.names(checkpoints)
        name = retention.name_for(step, names)
        temporary = checkpoints / f"{retention.TEMPORARY}{name}-{attempt}"
        if temporary.name in names:
            disk.remove_tree(temporary)
        disk.make_directory(temporary)
    except OSError as error:
        raise _refused(error, checkpoints, total) from error
    newer, older = retention.split(name, names)
    earlier = _earlier(disk, checkpoints, newer, older)
    try:
        done = _publish(
            disk, temporary, checkpoints / name, step, attempt, files, created, fence, earlier
        )
        _supersede(disk, checkpoints, newer)
    except BaseException as error:
        _discard(disk, temporary)
        if isinstance(error, OSError):
            raise _refused(error, temporary, total) from error
        raise
    return done


def publish_attempt(
    disk: Disk,
    run: Path,
    *,
    step: int,
    attempt: int,
    files: Mapping[str, Content],
    outputs: Iterable[Path],
    created: float,
) -> Checkpoint:
    """`publish` into a run's checkpoints, behind the fence of its attempts.

    Raises:
        NotDurableError, FencedError: as for `publish`.
    """
    return publish(
        disk,
        run / "checkpoints",
        step=step,
        attempt=attempt,
        files=files,
        outputs=outputs,
        created=created,
        fence=lambda: fences.check(disk, run, attempt),
    )


def _publish(
    disk: Disk,
    temporary: Path,
    target: Path,
    step: int,
    attempt: int,
    files: Mapping[str, Content],
    created: float,
    fence: Callable[[], None],
    earlier: _Earlier | None,
) -> Checkpoint:
    with ThreadPoolExecutor(1, "sums") as beside:  # summing takes the processor, writing the disk
        summing = {name: beside.submit(_described, content) for name, content in files.items()}
        for name, content in files.items():
            # A crash while writing leaves a temporary directory, which nobody reads.
            if not (
                _linked_beside(disk, temporary, name, files, summing)
                or _linked(disk, temporary / name, content, summing[name], earlier)
            ):
                disk.write(temporary / name, content)
        sums = {name: one.result() for name, one in summing.items()}
    for name in files:
        # A power cut after the rename must not find files that are empty or torn.
        disk.sync(temporary / name)
    manifest = Manifest(manifests.FORMAT, step, attempt, created, sums)
    # The manifest is last: without it a directory is no checkpoint, whatever its name.
    disk.write(temporary / manifests.NAME, manifests.encode(manifest))
    disk.sync(temporary / manifests.NAME)
    # A power cut after the rename must find all the names, not only the files' content.
    disk.sync_directory(temporary)
    # An old copy of the job, on a machine that was given up, stops here.
    fence()
    # Whole or not at all: a crash before this line leaves the older checkpoint as the newest.
    disk.rename(temporary, target)
    # A power cut after the receipt must find the new name.
    disk.sync_directory(target.parent)
    return Checkpoint(target, manifest)


def _supersede(disk: Disk, checkpoints: Path, newer: Sequence[str]) -> None:
    """Put aside what sorts as newer than what was just published (rule 4)."""
    # The newest one last: until all are, a crash leaves it the newest.
    for name in reversed(newer):
        _put_aside(disk, checkpoints / name, retention.SUPERSEDED)
    if newer:
        # A power cut after the receipt must not bring the old order back.
        disk.sync_directory(checkpoints)


def _earlier(
    disk: Disk, checkpoints: Path, newer: Sequence[str], older: Sequence[str]
) -> _Earlier | None:
    neighbours = [checkpoints / name for name in (*newer[-1:], *older[:1])]
    for name in older[1:2]:
        try:
            return _Earlier(checkpoints / name, _manifest(disk, checkpoints / name), neighbours)
        except (DamagedError, OSError):
            return None  # everything is written: what is wrong there is not this publish's matter
    return None


def _linked(
    disk: Disk, target: Path, content: Content, summing: Future[File], earlier: _Earlier | None
) -> bool:
    """Use the earlier checkpoint's file of this name, if it has the same content."""
    there = None if earlier is None else earlier.manifest.files.get(target.name)
    if earlier is None or there is None:
        return False
    source = earlier.path / target.name
    try:
        if any(_shared(disk, source, one / target.name) for one in earlier.neighbours):
            return False
        with memoryview(content) as whole, whole.cast("B") as new:
            if len(new) != there.length or not _alike(disk, source, new):
                return False
        if summing.result() != there or manifests.described(disk.stream(source)) != there:
            return False
    except OSError:
        return False  # the same
    return disk.link(source, target)


def _linked_beside(
    disk: Disk,
    temporary: Path,
    name: str,
    files: Mapping[str, Content],
    summing: Mapping[str, Future[File]],
) -> bool:
    """Use the file that rank 0 calls so, if this rank's is the same, as weights often are."""
    first = manifests.first_of(name)
    if first is None or first not in files:
        return False
    with (
        memoryview(files[first]) as theirs,
        theirs.cast("B") as old,
        memoryview(files[name]) as whole,
        whole.cast("B") as new,
    ):
        if len(old) != len(new) or any(
            old[at : at + _PIECE_BYTES] != new[at : at + _PIECE_BYTES] for at in _places(len(new))
        ):
            return False
    if summing[name].result() != summing[first].result():
        return False
    try:
        return disk.link(temporary / first, temporary / name)
    except OSError:
        return False  # then it is written, and what is wrong is said by that


def _shared(disk: Disk, file: Path, other: Path) -> bool:
    try:
        return disk.identity(file) == disk.identity(other)
    except (FileNotFoundError, NotADirectoryError):
        return False  # there is no such file


def _alike(disk: Disk, old: Path, new: memoryview) -> bool:
    """Whether some pieces are equal. Where training changed a file, it changed about all of it."""
    places = _places(len(new))
    pieces = disk.pieces(old, places, _PIECE_BYTES)
    return all(
        piece == new[at : at + _PIECE_BYTES] for piece, at in zip(pieces, places, strict=True)
    )


def _places(length: int) -> range:
    return range(0, length, max(1, length // _PIECES))


def _described(content: Content) -> File:
    with memoryview(content) as whole, whole.cast("B") as view:
        return manifests.described([view])


def newest(
    disk: Disk,
    checkpoints: Path,
    *,
    skip: int = 0,
    distrusted: Mapping[Path, str] = MappingProxyType({}),
) -> tuple[Checkpoint | None, list[SetAside]]:
    """The newest sound checkpoint; damaged ones that are newer are set aside.

    Args:
        disk: where they are.
        checkpoints: their directory.
        skip: how many of the newest ones to leave out, unread.
        distrusted: those that who loaded them found damaged, and why; they are set aside, too.

    Returns:
        The checkpoint (None: there is none), verified to the last bit, and what was set aside.

    Raises:
        OSError: the disk refused to be read, or to set aside.
    """
    set_aside: list[SetAside] = []
    for name in retention.newest_first(disk.names(checkpoints))[skip:]:
        path = checkpoints / name
        try:
            if path in distrusted:
                raise DamagedError(distrusted[path])
            return Checkpoint(path, verify(disk, path)), set_aside
        except DamagedError as error:
            aside = _put_aside(disk, path, retention.DAMAGED)
            disk.sync_directory(checkpoints)
            set_aside.append(SetAside(aside, str(error)))
    return None, set_aside


def verify(disk: Disk, path: Path, *, rank: int | None = None) -> Manifest:
    """Read all of a checkpoint, or what is a rank's in it, and compare it with its manifest.

    Raises:
        DamagedError: names the file, what was found and what was expected.
        OSError: the disk can't be read (which is not the checkpoint's damage).
    """
    try:
        names = disk.names(path)
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise DamagedError(f"{path}: {error.strerror}: it is no checkpoint") from error
        raise
    if manifests.NAME not in names:
        raise DamagedError(f"{path}: has no {manifests.NAME}: it is no whole checkpoint")
    manifest = _manifest(disk, path)
    order = retention.order_of(path.name)
    if order is not None and order[0] != manifest.step:
        raise DamagedError(f"{path}: its manifest says step {manifest.step}: it was renamed")
    wanted = manifest.files if rank is None else manifests.files_of(rank, manifest.files).values()
    for name in wanted:
        expected = manifest.files[name]
        if name not in names:
            raise DamagedError(f"{path / name}: missing; expected {expected.length} bytes")
        _compare(disk, path / name, expected)
    return manifest


def _compare(disk: Disk, path: Path, expected: File) -> None:
    # Before it is read: what a broken file system says may be more than can ever be.
    length = _size(disk, path)
    if length != expected.length:
        raise DamagedError(f"{path}: {length} bytes, expected {expected.length}")
    found = manifests.described(disk.stream(path))
    if found != expected:
        raise DamagedError(
            f"{path}: its xxh3-128 is {found.xxh3_128}, expected {expected.xxh3_128}: "
            "its content was changed"
        )


def listing(disk: Disk, checkpoints: Path) -> list[Listed]:
    """All checkpoints, newest first, then those set aside. Sums are not read."""
    names = disk.names(checkpoints)
    rows = []
    for name in retention.newest_first(names):
        path = checkpoints / name
        try:
            manifest = _manifest(disk, path)
        except DamagedError as error:
            rows.append(Listed(path, -1, -1, 0, 0.0, f"damaged: {error}"))
            continue
        length = sum(file.length for file in manifest.files.values())
        rows.append(
            Listed(path, manifest.step, manifest.attempt, length, manifest.created, "durable")
        )
    for why in (retention.DAMAGED, retention.SUPERSEDED):
        aside = [checkpoints / name for name in names if why in name]
        rows += [Listed(path, -1, -1, 0, 0.0, f"set aside: {why[1:]}") for path in aside]
    return rows


def prune(disk: Disk, checkpoints: Path, keep: int) -> list[str]:
    """Drop all but the `keep` newest checkpoints, and what crashes left behind.

    To be called right after a publish: the newest one is then known to be sound. A checkpoint is
    renamed before it is deleted, so that a crash in between never leaves half of one under its
    name.

    Returns:
        The names of the dropped checkpoints.

    Raises:
        OSError: the disk refused; the newest ones are untouched.
    """
    names = disk.names(checkpoints)
    leftovers = [n for n in names if n.startswith((retention.DROPPED, retention.TEMPORARY))]
    for name in leftovers:
        disk.remove_tree(checkpoints / name)
    dropped = retention.to_drop(names, keep)
    for name in dropped:
        disk.rename(checkpoints / name, checkpoints / f"{retention.DROPPED}{name}")
    if dropped:
        # Without it a power cut could bring back the name of a directory that is half deleted.
        disk.sync_directory(checkpoints)
    for name in dropped:
        disk.remove_tree(checkpoints / f"{retention.DROPPED}{name}")
    return dropped


def _prepare(disk: Disk, checkpoints: Path) -> None:
    if checkpoints.name not in disk.names(checkpoints.parent):
        disk.make_directory(checkpoints)
    # Always: an earlier attempt may have crashed between the two.
    disk.sync_directory(checkpoints.parent)


def _sync_if_there(disk: Disk, path: Path) -> None:
    try:
        disk.sync(path)
    except FileNotFoundError:
        return  # the script removed its own output; it is told so when it resumes


def _put_aside(disk: Disk, path: Path, why: str) -> Path:
    taken = set(disk.names(path.parent))
    name, number = f"{path.name}{why}", 2
    while name in taken:
        name, number = f"{path.name}{why}-{number}", number + 1
    disk.rename(path, path.parent / name)
    return path.parent / name


def _manifest(disk: Disk, checkpoint: Path) -> Manifest:
    path = checkpoint / manifests.NAME
    length = _size(disk, path)
    if length > manifests.BYTES_MAX:
        raise DamagedError(f"{path}: {length} bytes, expected at most {manifests.BYTES_MAX}")
    return manifests.decode(bytes(disk.read(path)), str(path))


def _size(disk: Disk, path: Path) -> int:
    """A file's length; that it is no regular file is damage, that it can't be asked is not."""
    try:
        return disk.size(path)
    except OSError as error:
        if error.errno in _NOT_THERE or error.strerror == "not a regular file":
            raise DamagedError(f"{path}: {error.strerror}") from error
        raise


def _discard(disk: Disk, temporary: Path) -> None:
    """Remove what a failed publish wrote, to give the space back; the failure itself is raised."""
    try:
        disk.remove_tree(temporary)
    except OSError:
        return  # it has a temporary name: nobody reads it, and the next prune removes it


def _refused(error: OSError, path: Path, total: int) -> NotDurableError:
    return NotDurableError(
        error.errno,
        f"{error.strerror or error} (a checkpoint of {total} bytes; older ones are untouched)",
        str(error.filename or path),
    )
