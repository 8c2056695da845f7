"""`ckptd slurm-script`: print a batch script that fits a command."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from ckptd.errors import UsageError
from ckptd.supervisor import launchers

_WARNING_S: Final = 120
_VARIABLE: Final = re.compile(r"\$SLURM_[A-Z0-9_]+|\$\{SLURM_[A-Z0-9_]+\}")
_SPECIAL: Final = re.compile(r'[\\"$`]')  # within double quotes
_ESCAPED: Final = r"\\\g<0>"
#: By what torchrun finds the other nodes. As variables within a shell of its own: the command stays
#: the same after a requeue to other nodes.
_NODES: Final = {
    "--nnodes": '"$SLURM_JOB_NUM_NODES"',
    "--rdzv-backend": "c10d",
    "--rdzv-endpoint": '"$SLURMD_NODENAME:$((20000 + SLURM_JOB_ID % 10000))"',
    "--rdzv-id": '"$SLURM_JOB_ID"',
}
_SRUN: Final = "srun --kill-on-bad-exit=1"
_SCRIPT: Final = """\
#!/bin/bash
#SBATCH --job-name={name}
{asked}
# Slurm puts the job back after a preemption or when a node is lost; its output goes on in the same
# file.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-{output}.out
# Before the time limit: SIGUSR1 to ckptd, which saves the job and has Slurm put it back into the
# queue.
#SBATCH --signal=B:USR1@{warning_s}

# exec: ckptd takes the place of the shell, which would not pass signals on.
exec ckptd launch --dir "$SLURM_SUBMIT_DIR/ckptd-runs" -- {command}
"""


@click.command("slurm-script")
@click.option("--name", default="train", show_default=True, help="The job's name.")
@click.option("--partition", help="The partition.  [default: the site's]")
@click.option(
    "--gpus", type=click.IntRange(min=0), default=1, show_default=True, help="GPUs of a node."
)
@click.option(
    "--cpus",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Processors of a node.",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Nodes. A torchrun is started on each; the ranks find each other.",
)
@click.option("--time", "limit", default="04:00:00", show_default=True, help="The time limit.")
@click.option("--array", help='Tasks of an array: "0-9". $SLURM_ARRAY_TASK_ID tells them apart.')
@click.option(
    "--warning",
    "warning_s",
    type=click.IntRange(min=1, max=65535),
    default=_WARNING_S,
    show_default=True,
    help="Seconds before the time limit at which the job is saved.",
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def command(
    argv: tuple[str, ...],
    name: str,
    partition: str | None,
    gpus: int,
    cpus: int,
    nodes: int,
    limit: str,
    array: str | None,
    warning_s: int,
) -> int:
    """Print a batch script that runs COMMAND under ckptd, for `| sbatch`.

    Other scripts, with every line explained, are in slurm/ of the repository.
    """
    asked = {
        "partition": partition,
        "array": array,
        "nodes": str(nodes) if nodes > 1 else None,
        "ntasks-per-node": "1" if nodes > 1 else None,
        "gres": f"gpu:{gpus}" if gpus else None,
        "cpus-per-task": str(cpus),
        "time": limit,
    }
    for key, value in asked.items():
        if value is not None and (not value or any(c.isspace() for c in value)):
            raise UsageError(f"--{key} {value!r}: a value without spaces is expected")
    lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    script = _SCRIPT.format(
        name=shlex.quote(name),
        asked="\n".join(lines),
        output="%A_%a" if array else "%j",
        warning_s=warning_s,
        command=_command(argv, nodes),
    )
    sys.stdout.write(script)
    for advice in _advice(argv, nodes):
        click.echo(f"ckptd: {advice}", err=True)
    return 0


def _command(argv: tuple[str, ...], nodes: int) -> str:
    """The command's words for the shell; a torchrun is started on every node."""
    words = [_word(word) for word in argv]
    names = [Path(word).name for word in argv]
    if nodes == 1 or "srun" in names or not set(names) & set(launchers.TORCHRUN):
        return " ".join(words)
    at = 1 + next(number for number, name in enumerate(names) if name in launchers.TORCHRUN)
    given = [word.partition("=")[0].replace("_", "-") for word in argv[at:]]
    nodes_own = [f"{key}={value}" for key, value in _NODES.items() if key not in given]
    step = " ".join([_SRUN, *words[:at], *nodes_own, *words[at:]])
    return f"bash -c {shlex.quote(f'exec {step}')}"


def _word(word: str) -> str:
    """Quoted for the shell, but Slurm's variables are still filled in there, also within words."""
    if _VARIABLE.search(word) is None:
        return shlex.quote(word)
    parts, at = [], 0
    for found in _VARIABLE.finditer(word):
        parts += [_SPECIAL.sub(_ESCAPED, word[at : found.start()]), found[0]]
        at = found.end()
    return f'"{"".join(parts)}{_SPECIAL.sub(_ESCAPED, word[at:])}"'


def _advice(argv: tuple[str, ...], nodes: int) -> Iterator[str]:
    """What a person should change in the command before it is submitted."""
    names = [Path(word).name for word in argv]
    if nodes > 1 and not {"srun", *launchers.TORCHRUN} & set(names):
        yield (
            f"the job has {nodes} nodes, and this command runs on the first one only: put `srun` "
            "in front of it, as slurm/several-nodes.sbatch does"
        )
    if nodes > 1 and "--standalone" in argv:
        yield "--standalone is for one node: leave it out"
    option = launchers.restarts(argv)
    if option is not None:
        yield (
            f"{option}: ckptd starts the whole job again when a rank dies, and does not know "
            "ranks that torchrun has started again: leave it at 0"
        )
