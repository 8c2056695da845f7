"""`ckptd checkpoint`: have a running job make a checkpoint now."""

from __future__ import annotations

from pathlib import Path

import click

from ckptd.cli import options
from ckptd.cli.asking import ask_supervisor


@click.command()
@click.argument("name")
@options.directory
def command(name: str, directory: Path) -> int:
    """Have the run NAME make a checkpoint at its next step, and wait until it is durable."""
    return ask_supervisor(directory, name, "checkpoint")
