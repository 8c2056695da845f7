"""`ckptd`: finds the command's file, and turns errors into one message and an exit code."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import Final, NoReturn

import click

from ckptd import __version__
from ckptd.errors import CkptdError, NotDurableError, UsageError

#: In the order in which a user meets them; each is a file beside this one.
_COMMANDS: Final = {
    "launch": "Start a command, and start it again until it has finished.",
    "resume": "Start a run again, or all of this user's that are to go on.",
    "install-service": "Have a machine go on with this user's jobs after a reboot.",
    "status": "What runs, how far it is, and what is durable.",
    "history": "A run's life: attempts, why each ended, what was lost, and the goodput.",
    "logs": "A run's output over all attempts.",
    "checkpoint": "Have a running job make a checkpoint now.",
    "stop": "Have a running job save itself and leave.",
    "drill": "Interrupt a script on purpose and prove, bit for bit, that it makes no difference.",
    "slurm-script": "Print a Slurm batch script for a command.",
    "doctor": "What could go wrong on this machine and with a run, and how to mend it.",
    "ls": "Runs, or the checkpoints of one.",
    "show": "What a checkpoint holds.",
    "verify": "Read a checkpoint to the last bit and compare it with its sums.",
}


class _Commands(click.Group):
    """Loads a command's file only when it is asked for: `launch` must start fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(f"ckptd.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command), "each file has one"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptd")
def cli() -> None:
    """PyTorch jobs that continue, bitwise, as if they had never been interrupted."""


def main() -> NoReturn:
    """Run the command line; exits with the code that the README's table explains."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except click.Abort:
        sys.exit(130)
    except CkptdError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except OSError as error:
        _tell(error)
        sys.exit(NotDurableError.exit_code)  # the run's directory can't be read or written
    sys.exit(code or 0)


def _tell(error: Exception) -> None:
    with suppress(OSError):  # a terminal that was closed must not change the exit code
        print(f"ckptd: {error}", file=sys.stderr, flush=True)
