"""`ckptd doctor`: what could go wrong here, and how to mend it."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import click

from ckptd.cli import options
from ckptd.host import host as hosts
from ckptd.supervisor import doctor
from ckptd.supervisor import run as runs
from ckptd.supervisor.policy import Policy
from ckptd.supervisor.registry import Registry

_DEFAULTS = Policy()


@click.command()
@click.argument("name", required=False)
@options.directory
@click.option("--grace", "grace_s", default=_DEFAULTS.grace_s, show_default=True)
@click.option("--keep", default=_DEFAULTS.keep, show_default=True)
def command(name: str | None, directory: Path, grace_s: float, keep: int) -> int:
    """Look at this machine, the directory of the runs, and the run NAME if it is given.

    Each finding that should be mended comes with the line that mends it. Exit code 1 if there is
    one, else 0.
    """
    host = hosts.recognised(os.environ)
    run = None if name is None else runs.find(directory, name)
    flush_s = None if run is None else doctor.slowest(run)
    findings = chain(
        doctor.of_host(host, Registry(os.environ), Path.home(), flush_s),
        doctor.of_machine(doctor.gpus()),
        doctor.of_directory(directory),
        () if run is None else doctor.of_run(run, keep, grace_s),
    )
    code = 0
    for finding in findings:
        click.echo(f"{'ok  ' if finding.mend is None else 'LOOK'}  {finding.what}")
        if finding.mend is not None:
            click.echo(f"      mend it: {finding.mend}")
            code = 1
    return code
