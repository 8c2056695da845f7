"""`ckptd history`: a run's life, and what the time went to."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from ckptd.cli import options
from ckptd.supervisor import history, journal
from ckptd.supervisor import run as runs
from ckptd.supervisor.history import Life
from ckptd.supervisor.policy import duration

_WIDTH_MIN: Final = 140


@click.command()
@click.argument("name")
@options.directory
def command(name: str, directory: Path) -> int:
    """Show the life of the run NAME: each attempt, why it ended, what was lost, and the goodput.

    Goodput is the share of the time since the first start that was training which counted: without
    waiting, starting, flushing, and steps that had to be done again.
    """
    run = runs.find(directory, name)
    holder = run.supervisor()
    runs_now = holder is not None and holder.alive() is not False
    life = history.life(journal.read(run.journal), time.time() if runs_now else None)
    if not life.attempts:
        click.echo(f"the run {name!r} was never started")
        return 0
    _table(life)
    _sums(life)
    return 0


def _table(life: Life) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, _WIDTH_MIN)  # in a narrow terminal lines go on below
    table = Table(box=None, pad_edge=False)
    for column in ("attempt", "began", "from", "to", "lost"):
        table.add_column(column, justify="left" if column == "began" else "right")
    for column in ("waited", "starting", "training", "flushing"):
        table.add_column(column, justify="right")
    table.add_column("ended by", overflow="fold")
    for one in life.attempts:
        began = datetime.fromtimestamp(one.began, UTC).astimezone()
        spent = (one.waited_s, one.starting_s, one.training_s, one.flushing_s)
        table.add_row(
            str(one.number),
            f"{began:%Y-%m-%d %H:%M:%S}",
            str(one.from_step),
            "?" if one.to_step is None else str(one.to_step),
            "?" if one.lost_steps is None and one.end != "it runs" else str(one.lost_steps or 0),
            *map(duration, spent),
            one.end,
        )
    console.print(table)


def _sums(life: Life) -> None:
    sums = {
        "training": sum(one.training_s for one in life.attempts),
        "of it done again": sum(one.lost_s for one in life.attempts),
        "starting": sum(one.starting_s for one in life.attempts),
        "flushing": sum(one.flushing_s for one in life.attempts),
        "waiting": sum(one.waited_s for one in life.attempts),
        "writing, beside training": sum(one.written_s for one in life.attempts),
    }
    click.echo()
    for name, seconds in sums.items():
        click.echo(f"{name:<26}{duration(seconds)}")
    if life.goodput is not None:
        click.echo(f"{'goodput':<26}{100 * life.goodput:.1f} % of {duration(life.total_s)}")
