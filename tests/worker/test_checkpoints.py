"""The worker and checkpoints on the disk: what it opens of them, and what it publishes alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptd import wire
from ckptd.host import memory
from ckptd.host.disk import RealDisk
from ckptd.store import store
from ckptd.worker import job as jobs
from ckptd.worker.arena import Arenas
from ckptd.worker.resting import Resting
from ckptd.worker.snapshot import FORMAT, Layouts, Reader, Writer
from ckptd.worker.tree import Frozen

WEIGHTS = torch.arange(6.0).view(2, 3)


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much memory as anyone wants."""
    monkeypatch.setattr(memory, "available", lambda: 2**50)


def captured(step: int) -> jobs._Captured:
    """A state of one tensor."""
    writer = Writer(Resting())
    entry = writer.add("model", Frozen(None, [("weight", WEIGHTS)]))
    document = {"format": FORMAT, "model": entry}
    arena, table, place = writer.write(document, [], Arenas(), Layouts())
    return jobs._Captured(arena, step, table, place, "")


def welcome(run: Path, keep: int = 1) -> wire.Welcome:
    return wire.Welcome("job", str(run), 1, None, None, keep)


def published(run: Path, step: int = 1) -> Path:
    run.mkdir(exist_ok=True)
    jobs._publish_alone(run, welcome(run), {0: captured(step).part()}, step)
    return run / "checkpoints" / f"{step:09d}"


def linked(path: Path) -> None:
    path.symlink_to("/etc/passwd")


EXTRAS = {"link": linked, "directory": Path.mkdir, "pipe": os.mkfifo, "file": Path.touch}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_only_what_the_manifest_lists_is_opened(
    tmp_path: Path, extra: Callable[[Path], object]
) -> None:
    """A link, a directory, a pipe or a file beside the checkpoint's files is not opened, whatever
    its name, and does no harm."""
    path = published(tmp_path / "run")
    extra(path / "extra.safetensors")
    manifest = store.verify(RealDisk(), path)
    reader = Reader.of_directory(path, {name: name for name in manifest.files})
    assert set(reader._files) == {"state.json", "model.safetensors"}
    (ref,) = reader.document["model"]["tensors"]
    assert torch.equal(reader.tensor(ref), WEIGHTS)
    reader.close()


def test_published_though_nothing_old_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker whose supervisor is gone has saved itself: that older checkpoints can't be removed
    is said, and is no failure."""
    run = tmp_path / "run"
    published(run)

    def refuses(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "000000001")

    monkeypatch.setattr(RealDisk, "remove_tree", refuses)
    published(run, step=2)
    assert "old checkpoints could not be removed" in capsys.readouterr().err
    found, _ = store.newest(RealDisk(), run / "checkpoints")
    assert found is not None
    assert found.step == 2
