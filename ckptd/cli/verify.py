"""`ckptd verify`: read checkpoints to the last bit."""

from __future__ import annotations

from pathlib import Path

import click

from ckptd.errors import DamagedError, UsageError
from ckptd.host.disk import RealDisk
from ckptd.store import manifest as manifests
from ckptd.store import retention, store


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> int:
    """Read every file of the checkpoint, or of all checkpoints of the run, at PATH.

    Exit code 0: all are sound. 74: one is damaged, and what is wrong with it is said.
    """
    damaged = 0
    for checkpoint in checkpoints_at(path):
        try:
            manifest = store.verify(RealDisk(), checkpoint)
        except DamagedError as error:
            damaged += 1
            click.echo(f"damaged  {error}")
        else:
            length = sum(file.length for file in manifest.files.values())
            click.echo(f"sound    {checkpoint}: step {manifest.step}, {length} bytes")
    return DamagedError.exit_code if damaged else 0


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint at a path, or those of the run there, newest first.

    Raises:
        UsageError: there is neither.
    """
    if (path / manifests.NAME).exists() or retention.order_of(path.name):
        return [path]
    for directory in (path / "checkpoints", path):
        names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
        found = [directory / name for name in retention.newest_first(names)]
        if found:
            return found
    raise UsageError(f"{path}: neither a checkpoint nor a run with checkpoints")
