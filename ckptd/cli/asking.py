"""Asking a run's supervisor to do something, and waiting until it is done."""

from __future__ import annotations

from pathlib import Path

import click

from ckptd.errors import NotDurableError, UsageError
from ckptd.supervisor import run as runs
from ckptd.supervisor import server


def ask_supervisor(directory: Path, name: str, what: str) -> int:
    """Ask, print the answer; the exit code.

    Raises:
        UsageError: no such run, or nobody supervises it here.
        NotDurableError: what was asked for did not happen.
    """
    holder = runs.find(directory, name).supervisor()
    if holder is None or holder.alive() is False:
        raise UsageError(f"the run {name!r} is not running: there is nothing to {what}")
    if holder.alive() is None:
        raise UsageError(f"the run {name!r} runs on {holder.host}: ask there")
    answer = server.ask(holder.socket, what)
    if not answer.ok:
        raise NotDurableError(answer.text)
    click.echo(answer.text)
    return 0
