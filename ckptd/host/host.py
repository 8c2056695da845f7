"""What started `ckptd launch`: a scheduler, a service manager, or nobody in particular.

Rules:

1. A host says what it knows and asks for what it is told to ask; it decides nothing about the job.
2. It never guesses. What it can't find out is None, and the supervisor goes by what the user set.
3. Every question to a scheduler has a time-out: it may be the scheduler that is in trouble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from ckptd.errors import UsageError

#: What `--host` may name; "auto" looks at the environment.
NAMES: Final = ("auto", "none", "slurm", "systemd")


class Host(Protocol):
    """What a supervisor runs under.

    Attributes:
        restarts: whether somebody starts the job again after `again`.
        returns: whether the job comes back by itself when the machine was lost or rebooted.
        job: what the host calls the job, the same over all its restarts; None: it has no name.
        restart: how often the host has started this job before.
    """

    @property
    def restarts(self) -> bool: ...

    @property
    def returns(self) -> bool: ...

    @property
    def job(self) -> str | None: ...

    @property
    def restart(self) -> int: ...

    def described(self) -> str:
        """One line for the user: where this runs, and until when."""

    def doubts(self, flush_s: float | None) -> list[tuple[str, str]]:
        """What would keep the job from being saved or started again, each with what mends it.

        Args:
            flush_s: seconds that a checkpoint takes; None: that is not known.
        """

    def left_s(self) -> float | None:
        """Seconds from now until the host kills the job; None: unknown, or never."""

    def again(self) -> str | None:
        """Have an interrupted job started again, where that has to be asked for.

        The last thing of all: what is asked for may kill whoever asks.

        Returns:
            What to tell the user.
        """

    def never_again(self) -> str | None:
        """See that nobody starts a job again that was given up on; as the last thing, as `again`.

        Returns:
            What came of it; None: nobody would have.
        """

    def ready(self) -> None:
        """The job runs."""

    def status(self, text: Callable[[], str]) -> None:
        """What it does, in one line, made only where somebody reads it."""

    def alive(self) -> None:
        """The supervisor is not stuck."""

    def more_time(self, seconds: float) -> None:
        """Saving takes this long still."""


class Plain:
    """A machine without anything: the user starts the job again. Other hosts add what they know."""

    restarts = False
    returns = False
    job: str | None = None
    restart = 0

    def described(self) -> str:
        """See `Host`."""
        return ""

    def doubts(self, flush_s: float | None) -> list[tuple[str, str]]:  # noqa: ARG002
        """See `Host`."""
        return []

    def left_s(self) -> float | None:
        """See `Host`."""
        return None

    def again(self) -> str | None:
        """See `Host`."""
        return None

    def never_again(self) -> str | None:
        """See `Host`."""
        return None

    def ready(self) -> None:
        """See `Host`."""

    def status(self, text: Callable[[], str]) -> None:
        """See `Host`."""

    def alive(self) -> None:
        """See `Host`."""

    def more_time(self, seconds: float) -> None:
        """See `Host`."""


def recognised(environment: Mapping[str, str], named: str = "auto") -> Host:
    """The host that the environment shows, or the one that was named.

    Raises:
        UsageError: the environment has nothing of the host that was named.
    """
    from ckptd.host import slurm, systemd

    variables = {"slurm": slurm.JOB_VARIABLE, "systemd": systemd.SOCKET_VARIABLE}
    makers: dict[str, Callable[[Mapping[str, str]], Host]] = {
        "slurm": slurm.Slurm,
        "systemd": systemd.Systemd,
    }
    for name, variable in variables.items():
        if named in ("auto", name) and variable in environment:
            if name == "systemd" and named == "auto" and not systemd.is_main(environment):
                continue
            return makers[name](environment)
    if named in variables:
        how = {"slurm": "Submit it with sbatch", "systemd": "Start it as a service (Type=notify)"}
        raise UsageError(
            f"--host {named}: ${variables[named]} is not set, so {named} has not started this. "
            f"{how[named]}, or leave the option out"
        )
    return Plain()
