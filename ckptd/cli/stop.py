"""`ckptd stop`: have a running job save itself and leave."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ckptd.cli import options
from ckptd.cli.asking import ask_supervisor
from ckptd.supervisor import run as runs
from ckptd.supervisor.registry import Registry


@click.command()
@click.argument("name")
@options.directory
def command(name: str, directory: Path) -> int:
    """Have the run NAME save itself and leave, and wait until it has. It resumes where it stops.

    It does not go on by itself after a reboot any more.
    """
    run = runs.find(directory, name)
    holder = run.supervisor()
    was_to_go_on = Registry(os.environ).remove(run)
    if was_to_go_on and (holder is None or holder.alive() is False):
        click.echo(f"the run {name!r} is not running now; it will not go on after a reboot")
        return 0
    return ask_supervisor(directory, name, "stop")
