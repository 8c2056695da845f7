"""The enumeration of faults is put to the test: each planted bug must be caught by it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import enumeration
import pytest
from simulated import SimulatedDisk

from ckptd.errors import NotDurableError
from ckptd.store import manifest as manifests
from ckptd.store import retention, store

RUN = Path("/run")
Patch = pytest.MonkeyPatch


def ignore(patch: Patch, operation: str, chosen: Callable[[Path], bool]) -> None:
    """An operation that the store forgot to ask for, for the chosen paths."""
    real = getattr(SimulatedDisk, operation)

    def forgotten(disk: SimulatedDisk, path: Path) -> None:
        if not chosen(path):
            real(disk, path)

    patch.setattr(SimulatedDisk, operation, forgotten)


def data_files_not_synced(patch: Patch) -> None:
    ignore(patch, "sync", lambda path: path.name in enumeration.content_of(1))


def manifest_not_synced(patch: Patch) -> None:
    ignore(patch, "sync", lambda path: path.name == manifests.NAME)


def temporary_directory_not_synced(patch: Patch) -> None:
    ignore(patch, "sync_directory", lambda path: path.name.startswith(retention.TEMPORARY))


def rename_not_synced(patch: Patch) -> None:
    ignore(patch, "sync_directory", lambda path: path.name == "checkpoints")


def checkpoints_directory_not_synced(patch: Patch) -> None:
    ignore(patch, "sync_directory", lambda path: path == RUN)


def renamed_before_synced(patch: Patch) -> None:
    """All the same operations, but the rename comes before the manifest's and directory's sync."""

    def publish(disk, temporary, target, step, attempt, files, created, fence, earlier):
        sums = {}
        for name, content in files.items():
            disk.write(temporary / name, content)
            disk.sync(temporary / name)
            sums[name] = manifests.File(len(content), manifests.sum_of(content))
        manifest = manifests.Manifest(manifests.FORMAT, step, attempt, created, sums)
        disk.write(temporary / manifests.NAME, manifests.encode(manifest))
        disk.rename(temporary, target)
        disk.sync(target / manifests.NAME)
        disk.sync_directory(target)
        disk.sync_directory(target.parent)
        return store.Checkpoint(target, manifest)

    patch.setattr(store, "_publish", publish)


def written_in_place(patch: Patch) -> None:
    """No temporary name: the files are written where they are to be found."""
    real = store._publish

    def publish(disk, temporary, target, *rest):
        SimulatedDisk.rename(disk, temporary, target)
        with patch.context() as within:
            within.setattr(SimulatedDisk, "rename", lambda *_: None)
            return real(disk, target, target, *rest)

    patch.setattr(store, "_publish", publish)


def pruned_before_publish(patch: Patch) -> None:
    """Space is made first: everything older goes, and then the new one is written."""
    real = enumeration.publish

    def publish(disk, checkpoints, step):
        with suppress(OSError):
            for name in retention.newest_first(disk.names(checkpoints)):
                disk.remove_tree(checkpoints / name)
        real(disk, checkpoints, step)

    patch.setattr(enumeration, "publish", publish)


def pruned_before_rename_was_synced(patch: Patch) -> None:
    """The new name is counted on for dropping the older ones before it is durable."""
    real = SimulatedDisk.sync_directory

    def sync_directory(disk: SimulatedDisk, path: Path) -> None:
        if path.name == "checkpoints":
            for name in retention.newest_first(disk.names(path))[1:]:
                disk.remove_tree(path / name)
        real(disk, path)

    patch.setattr(SimulatedDisk, "sync_directory", sync_directory)


def dropped_without_rename(patch: Patch) -> None:
    """A checkpoint is deleted under its own name."""

    def prune(disk, checkpoints, keep):
        names = disk.names(checkpoints)
        dropped = retention.to_drop(names, keep)
        temporary = [name for name in names if name.startswith(retention.TEMPORARY)]
        for name in [*dropped, *temporary]:
            disk.remove_tree(checkpoints / name)
        return dropped

    patch.setattr(store, "prune", prune)


def drop_not_synced(patch: Patch) -> None:
    """`prune` deletes before the renames that hide what it deletes are durable."""
    real = store.prune

    def prune(disk, checkpoints, keep):
        with patch.context() as within:
            within.setattr(SimulatedDisk, "sync_directory", lambda *_: None)
            return real(disk, checkpoints, keep)

    patch.setattr(store, "prune", prune)


def not_superseded(patch: Patch) -> None:
    """What is higher than the step that was published stays the newest."""
    patch.setattr(store, "_supersede", lambda *_: None)


def superseded_not_synced(patch: Patch) -> None:
    """A power cut brings back what the job did not go on from, after the receipt."""
    real = store._supersede

    def supersede(disk, checkpoints, newer):
        with patch.context() as within:
            within.setattr(SimulatedDisk, "sync_directory", lambda *_: None)
            real(disk, checkpoints, newer)

    patch.setattr(store, "_supersede", supersede)


def superseded_before_published(patch: Patch) -> None:
    """What is higher is put aside first: until the new one is there, something older is found."""
    real, supersede = store._publish, store._supersede
    patch.setattr(store, "_supersede", lambda *_: None)

    def publish(disk, temporary, target, *rest):
        newer, _ = retention.split(target.name, disk.names(target.parent))
        supersede(disk, target.parent, newer)
        return real(disk, temporary, target, *rest)

    patch.setattr(store, "_publish", publish)


def newest_ones_dropped(patch: Patch) -> None:
    patch.setattr(
        retention, "to_drop", lambda names, keep: retention.newest_first(names)[:-1][:keep]
    )


def verified_without_sums(patch: Patch) -> None:
    """The lengths are enough for `verify`."""

    def verify(disk, path):
        manifest = manifests.decode(disk.read(path / manifests.NAME), str(path))
        for name, expected in manifest.files.items():
            assert disk.size(path / name) == expected.length
        return manifest

    patch.setattr(store, "verify", verify)


def failures_swallowed(patch: Patch) -> None:
    """`publish` returns although the disk refused."""
    real = store.publish

    def publish(*args, **kwargs):
        with suppress(NotDurableError):
            real(*args, **kwargs)

    patch.setattr(store, "publish", publish)


def leftovers_not_removed(patch: Patch) -> None:
    """What a crash left is in the way of the next publish of that step, and stays for ever."""
    real = SimulatedDisk.remove_tree

    def remove_tree(disk: SimulatedDisk, path: Path) -> None:
        if not path.name.startswith(retention.TEMPORARY):
            real(disk, path)

    patch.setattr(SimulatedDisk, "remove_tree", remove_tree)


def shared_with_the_neighbour(patch: Patch) -> None:
    """An unchanged file gets its second name from the next older checkpoint."""
    real = store._earlier
    patch.setattr(store, "_shared", lambda *_: False)
    patch.setattr(
        store,
        "_earlier",
        lambda disk, checkpoints, newer, older: real(disk, checkpoints, newer, ["", *older]),
    )


def neighbours_not_compared(patch: Patch) -> None:
    """That the second next older checkpoint shares with no neighbour is taken for granted."""
    patch.setattr(store, "_shared", lambda *_: False)


BUGS = [
    data_files_not_synced,
    manifest_not_synced,
    temporary_directory_not_synced,
    rename_not_synced,
    checkpoints_directory_not_synced,
    renamed_before_synced,
    written_in_place,
    pruned_before_publish,
    pruned_before_rename_was_synced,
    dropped_without_rename,
    drop_not_synced,
    newest_ones_dropped,
    verified_without_sums,
    failures_swallowed,
    leftovers_not_removed,
    not_superseded,
    superseded_not_synced,
    superseded_before_published,
    shared_with_the_neighbour,
    neighbours_not_compared,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(monkeypatch: Patch, bug: Callable[[Patch], None]) -> None:
    """With this one bug in the store, some fault breaks a promise, and the checks see it."""
    bug(monkeypatch)
    caught = []
    for how, code in [*enumeration.CUTS, ("once", errno.EIO)]:
        try:
            enumeration.enumerate_faults(RUN, how, code)
        except AssertionError as error:
            caught.append(str(error))
    assert caught, f"{bug.__name__} goes unseen"
