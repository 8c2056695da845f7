"""`ckptd stop`: have a running job save itself and leave."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import click

from ckptd.cli import options
from ckptd.cli.asking import ask_supervisor
from ckptd.supervisor import run as runs
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.run import Run, SupervisorFile

#: A lock without a living supervisor: of one that starts, or of a worker that outlived its own.
_STARTS_WITHIN_S: Final = 10.0
_POLL_S: Final = 0.05


@click.command()
@click.argument("name")
@options.directory
def command(name: str, directory: Path) -> int:
    """Have the run NAME save itself and leave, and wait until it has. It resumes where it stops.

    It does not go on by itself after a reboot any more.
    """
    run = runs.find(directory, name)
    # First: what is about to start looks for this once it holds the lock, and refuses.
    was_to_go_on = Registry(os.environ).remove(run)
    holder = _holder(run)
    if was_to_go_on and (holder is None or holder.alive() is False):
        click.echo(f"the run {name!r} is not running now; it will not go on after a reboot")
        return 0
    return ask_supervisor(directory, name, "stop")


def _holder(run: Run) -> SupervisorFile | None:
    """Who supervises it, also when it has only just got the lock and has not said so yet."""
    until_s = time.monotonic() + _STARTS_WITHIN_S
    while True:
        held, holder = runs.is_locked(run), run.supervisor()
        starts = held and (holder is None or holder.alive() is False)
        if not starts or time.monotonic() >= until_s:
            return holder
        time.sleep(_POLL_S)
