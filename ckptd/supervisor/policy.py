"""Numbers and choices of the supervisor. Pure."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

#: Names of the signals by which jobs end and are ended; the numbers are the same on every Linux.
_SIGNALS: Final = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    10: "SIGUSR1",
    11: "SIGSEGV",
    12: "SIGUSR2",
    13: "SIGPIPE",
    15: "SIGTERM",
    24: "SIGXCPU",
    25: "SIGXFSZ",
}


class Exit(IntEnum):
    """Exit codes of `ckptd launch` (sysexits.h)."""

    FINISHED = 0
    USAGE = 64
    LOCKED = 69
    GAVE_UP = 70
    NOT_DURABLE = 74
    INTERRUPTED = 75


class Policy(msgspec.Struct, frozen=True):
    """What the user can set.

    Attributes:
        every_s: at most so long between two durable checkpoints of a running job.
        grace_s: from a notice to the end of the worker, where the host knows no better.
        grace_given: the user chose it: where the host leaves more, it is not used.
        keep: checkpoints to keep.
        memory_tier: whether the newest snapshot stays in memory, to start again from.
        restarts_max: failures without progress between them before giving up.
        backoff_s: the pause before the first relaunch; doubled for each further one.
        backoff_s_max: its limit.
        kill_s: how long killed processes may take to be gone.
        flush_signal: what is sent to a command that never attaches, to have it save and leave;
            None: the signal that came.
    """

    every_s: float = 300.0
    grace_s: float = 30.0
    keep: int = 3
    memory_tier: bool = True
    restarts_max: int = 3
    backoff_s: float = 1.0
    backoff_s_max: float = 60.0
    kill_s: float = 10.0
    flush_signal: int | None = None
    grace_given: bool = False

    def pause_s(self, failures: int) -> float:
        """The pause before the relaunch after the `failures`-th failure in a row, in seconds."""
        return min(self.backoff_s * 2.0 ** min(failures - 1, 60), self.backoff_s_max)


#: What a host leaves is not used up: whoever was killed at the deadline is still to be saved.
_RESERVE_S: Final = 5.0
_RESERVE_SHARE: Final = 0.25


def within(left_s: float) -> float:
    """The grace, where the host kills the job in `left_s` seconds."""
    return max(left_s - min(_RESERVE_S, left_s * _RESERVE_SHARE), 0.0)


def failures_in_a_row(before: int, step: int, failed_step: int | None) -> int:
    """How many failures in a row this is: progress since the last one starts the count anew.

    Args:
        before: the count so far.
        step: where the job was when it failed now.
        failed_step: where it was when it failed last; None: it has not failed.
    """
    progressed = failed_step is None or step > failed_step
    return 1 if progressed else before + 1


def described(code: int) -> str:
    """An exit status in words: "exit status 1", "signal 9 (SIGKILL)"."""
    if code >= 0:
        return f"exit status {code}"
    return f"signal {-code}" + (f" ({_SIGNALS[-code]})" if -code in _SIGNALS else "")


def signal_name(number: int) -> str:
    """A signal's name: "SIGTERM"."""
    return _SIGNALS.get(number, f"signal {number}")


def exit_of(code: int) -> int:
    """The exit code that passes on a command's own: 128+n for death by signal n."""
    return code if code >= 0 else 128 - code
