"""What started `ckptd launch`: a scheduler, a service manager, or nobody in particular.

Rules:

1. A host says what it knows and asks for what it is told to ask; it decides nothing about the job.
2. It never guesses. What it can't find out is None, and the supervisor goes by what the user set.
3. Every question to a scheduler has a time-out: it may be the scheduler that is in trouble.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Notice:
    """What a host knows of a stop signal.

    Attributes:
        left_s: seconds from now until it kills the job; None: unknown, or never.
        why: what it is for, for a person; None: unknown.
        assumed: `left_s` is what is usual here: where the user gives a grace, that one holds.
    """

    left_s: float | None = None
    why: str | None = None
    assumed: bool = False


class Host(Protocol):
    """What a supervisor runs under.

    Attributes:
        restarts: whether somebody starts the job again after `again`.
        returns: whether the job comes back by itself when the machine was lost or rebooted.
        job: what the host calls the job, the same over all its restarts; None: it has no name.
        restart: how often the host has started this job before.
        nodes: on how many machines the job's processes run.
        address: under which name the others of them find this one.
    """

    @property
    def restarts(self) -> bool: ...

    @property
    def returns(self) -> bool: ...

    @property
    def job(self) -> str | None: ...

    @property
    def restart(self) -> int: ...

    @property
    def nodes(self) -> int: ...

    @property
    def address(self) -> str: ...

    def described(self) -> str:
        """One line for the user: where this runs, and until when."""

    def doubts(self, flush_s: float | None) -> list[tuple[str, str]]:
        """What would keep the job from being saved or started again, each with what mends it.

        Args:
            flush_s: seconds that a checkpoint takes; None: that is not known.
        """

    def notice(self) -> Notice:
        """After a stop signal: how long is left, and why it came."""

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
    nodes = 1
    address = os.uname().nodename

    def described(self) -> str:
        """See `Host`."""
        return ""

    def doubts(self, flush_s: float | None) -> list[tuple[str, str]]:  # noqa: ARG002
        """See `Host`."""
        return []

    def notice(self) -> Notice:
        """See `Host`."""
        return Notice()

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
