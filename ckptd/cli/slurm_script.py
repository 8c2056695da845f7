"""`ckptd slurm-script`: print a batch script that fits a command."""

from __future__ import annotations

import shlex
import sys
from typing import Final

import click

from ckptd.errors import UsageError

_WARNING_S: Final = 120
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
@click.option("--gpus", type=click.IntRange(min=0), default=1, show_default=True, help="GPUs.")
@click.option(
    "--cpus", type=click.IntRange(min=1), default=8, show_default=True, help="Processors."
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
        command=" ".join(_word(word) for word in argv),
    )
    sys.stdout.write(script)
    return 0


def _word(word: str) -> str:
    """Quoted for the shell, but Slurm's variables are still filled in there."""
    return (
        f'"{word}"' if word.startswith("$SLURM_") and word[1:].isidentifier() else shlex.quote(word)
    )
