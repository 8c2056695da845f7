"""`ckptd ls`: runs, or the checkpoints of one."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from ckptd.cli import options, status
from ckptd.host.disk import RealDisk
from ckptd.store import store
from ckptd.supervisor import run as runs


@click.command()
@click.argument("name", required=False)
@options.directory
def command(name: str | None, directory: Path) -> int:
    """List all runs; with NAME, the checkpoints of that run, newest first."""
    if name is None:
        context = click.get_current_context()
        return int(context.invoke(status.command, name=None, directory=directory))
    run = runs.find(directory, name)
    _table(store.listing(RealDisk(), run.checkpoints), run.checkpoints)
    return 0


def _table(rows: list[store.Listed], where: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        click.echo(f"no checkpoints in {where}")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("checkpoint", "step", "attempt", "MiB", "created", "state"):
        table.add_column(column, justify="right" if column in ("step", "MiB") else "left")
    for row in rows:
        when = datetime.fromtimestamp(row.created, UTC).astimezone()
        table.add_row(
            row.path.name,
            "" if row.step < 0 else str(row.step),
            "" if row.attempt < 0 else str(row.attempt),
            f"{row.length / 2**20:.1f}",
            "" if row.step < 0 else f"{when:%Y-%m-%d %H:%M:%S}",
            row.state,
        )
    Console().print(table)
