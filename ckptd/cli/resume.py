"""`ckptd resume`: start runs again as they were started last."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ckptd.cli import options
from ckptd.errors import UsageError
from ckptd.host import hosts
from ckptd.supervisor import registry
from ckptd.supervisor import run as runs
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.service import Service
from ckptd.supervisor.terminal import Terminal


@click.command()
@click.argument("name", required=False)
@click.option(
    "--all",
    "all_of_them",
    is_flag=True,
    help="Every job of this user that has not finished and was not stopped by its owner.",
)
@click.option("--stay", is_flag=True, help="With --all: wait for more when none is left.")
@options.directory
def command(name: str | None, directory: Path, *, all_of_them: bool, stay: bool) -> int:
    """Start the run NAME again: the same command, options, directory and environment as last.

    \b
    --all is what a service does at boot (`ckptd install-service`): each job under a supervisor of
    its own. A job goes on unless it finished, was given up on, or was ended by Ctrl-C or `ckptd
    stop`.
    """  # noqa: D301  # \b is click's mark for a paragraph that is not rewrapped
    if all_of_them == (name is not None):
        raise UsageError("say which run is to go on: `ckptd resume NAME`, or `ckptd resume --all`")
    if name is not None:
        argv, cwd, environment = registry.command_for(runs.find(directory, name))
        os.chdir(cwd)
        # The same process goes on, as its supervisor.
        os.execve(argv[0], argv, environment)  # noqa: S606
    jobs = Registry(os.environ)
    if stay:
        jobs.serve()
    terminal = Terminal()
    click.get_current_context().call_on_close(terminal.drain)
    return Service(jobs, hosts.recognised(os.environ), terminal.say, stay=stay).run()
