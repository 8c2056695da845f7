"""`ckptd stop`: have a running job save itself and leave."""

from __future__ import annotations

from pathlib import Path

import click

from ckptd.cli import options
from ckptd.cli.asking import ask_supervisor


@click.command()
@click.argument("name")
@options.directory
def command(name: str, directory: Path) -> int:
    """Have the run NAME save itself and leave, and wait until it has. It resumes where it stops."""
    return ask_supervisor(directory, name, "stop")
