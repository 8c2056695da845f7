"""`ckptd slurm-script`: print a batch script that fits a command."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Final

import click

from ckptd.errors import UsageError

_WARNING_S: Final = 120
_VARIABLE: Final = re.compile(r"\$SLURM_[A-Z0-9_]+|\$\{SLURM_[A-Z0-9_]+\}")
_SPECIAL: Final = re.compile(r'[\\"$`]')  # within double quotes
_ESCAPED: Final = r"\\\g<0>"
#: The options by which programs start a command several times.
_RANKS: Final = {
    "srun": ("-n", "--ntasks", "-N", "--nodes", "--ntasks-per-node", "--ntasks-per-gpu"),
    "torchrun": ("--nproc-per-node", "--nproc_per_node", "--nnodes"),
    "torch.distributed.run": ("--nproc-per-node", "--nproc_per_node", "--nnodes"),
}
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
    refusal = _refusal(argv)
    if refusal is not None:
        click.echo(f"ckptd: {refusal}", err=True)
    return 0


def _word(word: str) -> str:
    """Quoted for the shell, but Slurm's variables are still filled in there, also within words."""
    if _VARIABLE.search(word) is None:
        return shlex.quote(word)
    parts, at = [], 0
    for found in _VARIABLE.finditer(word):
        parts += [_SPECIAL.sub(_ESCAPED, word[at : found.start()]), found[0]]
        at = found.end()
    return f'"{"".join(parts)}{_SPECIAL.sub(_ESCAPED, word[at:])}"'


def _refusal(argv: tuple[str, ...]) -> str | None:
    """Why ckptd will refuse a command that is one training over several ranks; None: it is not."""
    names: tuple[str, ...] = ()
    several = False
    for word, following in zip(argv, (*argv[1:], ""), strict=True):
        names = _RANKS.get(Path(word).name, names)
        if word.endswith(".py"):
            break  # what comes now are the script's own options
        option, _, value = word.partition("=")
        if option[:1] == "-" != option[1:2]:  # -n4
            option, value = word[:2], word[2:]
        # Also "gpu", "auto" and "1:4" of torchrun: as many as there are.
        several |= option in names and (value or following) not in ("0", "1")
    if not several:
        return None
    return (
        "this command starts several ranks of one training. ckptd carries jobs of one process, and "
        "their workers will refuse to start. Trainings that are independent of each other can be "
        "started by `srun`, each under a ckptd of its own: slurm/several-tasks.sbatch"
    )
