"""`ckptd doctor`: what could go wrong here, and how to mend it."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import click

from ckptd.cli import options
from ckptd.host import hosts, systemd
from ckptd.supervisor import doctor
from ckptd.supervisor import run as runs
from ckptd.supervisor.policy import Policy
from ckptd.supervisor.registry import Registry

_DEFAULTS = Policy()


@click.command()
@click.argument("name", required=False)
@options.directory
@click.option("--grace", "grace_s", type=float, help="Seconds.  [default: as it was launched]")
@click.option("--keep", type=int, help="Checkpoints.  [default: as it was launched]")
def command(name: str | None, directory: Path, grace_s: float | None, keep: int | None) -> int:
    """Look at this machine, the directory of the runs, and the run NAME if it is given.

    Each finding that should be mended comes with the line that mends it. Exit code 1 if there is
    one, else 0.
    """
    host = hosts.recognised(os.environ)
    run = None if name is None else runs.find(directory, name)
    launched = {} if run is None else doctor.launched_with(run)
    keep = keep or int(launched.get("--keep", _DEFAULTS.keep))
    grace_s = grace_s or float(launched.get("--grace", _DEFAULTS.grace_s))
    memory_tier = launched.get("--memory-tier") != "off"
    flush_s = None if run is None else doctor.slowest(run)
    findings = chain(
        doctor.of_host(host, Registry(os.environ), systemd.user_units(os.environ), flush_s),
        doctor.of_machine(doctor.gpus()),
        doctor.of_directory(directory, host.nodes),
        () if run is None else doctor.of_run(run, keep, grace_s, memory_tier=memory_tier),
    )
    code = 0
    for finding in findings:
        click.echo(f"{'ok  ' if finding.mend is None else 'LOOK'}  {finding.what}")
        if finding.mend is not None:
            click.echo(f"      mend it: {finding.mend}")
            code = 1
    return code
