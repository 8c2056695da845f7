"""`ckptd logs`: a run's output over all attempts."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO

import click

from ckptd.cli import options
from ckptd.errors import UsageError
from ckptd.supervisor import run as runs
from ckptd.supervisor.run import Run

_CHUNK = 1 << 16
_POLL_S = 0.2


@click.command()
@click.argument("name")
@options.directory
@click.option("-f", "--follow", is_flag=True, help="Go on as output comes, while the run is held.")
def command(name: str, directory: Path, *, follow: bool) -> int:
    """Print the output of the run NAME over all its attempts."""
    run = runs.find(directory, name)
    try:
        log = run.log.open("rb")
    except FileNotFoundError:
        raise UsageError(f"the run {name!r} has no output yet") from None
    with log:
        _copy(log)
        while follow and _supervised(run):
            time.sleep(_POLL_S)
            _copy(log)
        _copy(log)
    return 0


def _supervised(run: Run) -> bool:
    holder = run.supervisor()
    return holder is not None and holder.alive() is not False


def _copy(log: IO[bytes]) -> None:
    while chunk := log.read(_CHUNK):
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()
