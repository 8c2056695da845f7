"""Numbers and choices of the supervisor. Pure."""

from __future__ import annotations

import math
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


#: At least so long between two snapshots that are only held in memory, however cheap they are.
HOLD_S_MIN: Final = 1.0
#: After so many crashes of one kind at one step, the checkpoint may be the cause.
SUSPECT_AFTER: Final = 3
#: A write that takes longer is said to hang, in seconds.
SLOW_WRITE_S: Final = 60.0
#: How many times the measured duration of a write is kept free for one before a deadline.
WRITE_MARGIN: Final = 2.0
#: How long a write may take at a stop that nobody limits, in seconds.
WRITE_S_MAX: Final = 600.0
#: How fast a first checkpoint is assumed to be written, in bytes a second.
WRITE_RATE: Final = 3e8
#: How long writing down what a job that hangs is doing may take, in seconds.
INSPECT_S: Final = 20.0
#: How fast a first snapshot is assumed to fill memory that no one has used yet, in bytes a second.
FILL_RATE: Final = 1e9


class Policy(msgspec.Struct, frozen=True):
    """What the user can set.

    Attributes:
        every_s: at most so long between two durable checkpoints of a running job.
        overhead: the share of the run time that snapshots into memory may cost; 0: none are taken.
        grace_s: from a notice to the end of the worker, where the host knows no better.
        grace_given: the user chose it: where the host leaves more, it is not used.
        comes_back: the host starts an interrupted job again, where that is asked for.
        keep: checkpoints to keep.
        memory_tier: whether the newest snapshot stays in memory, to start again from.
        restarts_max: failures without progress between them before giving up.
        backoff_s: the pause before the first relaunch; doubled for each further one.
        backoff_s_max: its limit.
        kill_s: how long killed processes may take to be gone.
        hang_after_s: without progress for so long, a job hangs; infinite: never; None: learned.
        flush_signal: what is sent to a command that never attaches, to have it save and leave;
            None: the signal that came.
    """

    every_s: float = 300.0
    overhead: float = 0.01
    grace_s: float = 30.0
    keep: int = 3
    memory_tier: bool = True
    restarts_max: int = 3
    backoff_s: float = 1.0
    backoff_s_max: float = 60.0
    kill_s: float = 10.0
    flush_signal: int | None = None
    grace_given: bool = False
    comes_back: bool = False
    hang_after_s: float | None = None

    def hold_every_s(self, cost_s: float) -> float:
        """How long to train between two snapshots into memory, in seconds.

        Args:
            cost_s: for how long one holds up training.
        """
        return max(HOLD_S_MIN, cost_s / self.overhead) if self.overhead > 0 else math.inf

    def pause_s(self, failures: int) -> float:
        """The pause before the relaunch after the `failures`-th failure in a row, in seconds."""
        return min(self.backoff_s * 2.0 ** min(failures - 1, 60), self.backoff_s_max)


def space_short(length: int, keep: int, there: int, free: int) -> str | None:
    """What to say where the checkpoints will not all fit; None: they will.

    Args:
        length: bytes of one checkpoint.
        keep: how many are kept. One more is there while it is written.
        there: how many are there already.
        free: bytes that are free.
    """
    missing = max(1, keep + 1 - there)
    needed = missing * length
    if needed <= free:
        return None
    fitting = free // length + there - 1
    # Not even one fits: an old one is only removed when the next one is durable.
    fewer = length <= free and 1 <= fitting < keep
    advice = f"or keep fewer: --keep {fitting}" if fewer else "or use another --dir"
    return (
        f"a checkpoint has about {sized(length)}; --keep {keep} and one that is being written need "
        f"{sized(needed)} more, and {sized(free)} are free. Free some, {advice}. Training goes on."
    )


def at_stake(
    grace_s: float,
    *,
    flush_s: float | None,
    step_s: float | None,
    crash_s: float,
    power_s: float,
    refused: bool = False,
) -> str:
    """What an interruption would cost now, for a person.

    Args:
        grace_s: how long a stopped job has.
        flush_s: how long the last snapshot and its write took; None: there was none yet.
        step_s: how long a step takes; None: not known.
        crash_s: the age of the newest state that is in memory or durable.
        power_s: the age of the newest durable one.
        refused: the disk refused the last write.
    """
    needs_s = None if flush_s is None else flush_s + (step_s or 0.0)
    if refused:
        term = f"≤ {duration(power_s)}, unless the disk takes it again"
    else:
        term = "0 steps" if needs_s is None or needs_s <= grace_s else f"≤ {duration(crash_s)}"
    words = [
        f"SIGTERM: {term}",
        f"crash: ≤ {duration(crash_s)}",
        f"power cut: ≤ {duration(power_s)}",
    ]
    if needs_s is not None:
        words.append(f"a flush needs {duration(needs_s)}, the grace is {grace_s:g} s")
    return "; ".join(words)


def duration(seconds: float) -> str:
    """A duration for a person: "0.8 s", "12 s", "4 min", "2.2 h"."""
    if seconds < 120:  # two minutes are still easy to read in seconds
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def sized(length: float) -> str:
    """A number of bytes for a person: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if length < 1024:  # a power of two of the units
            return f"{length:.4g} {unit}"
        length /= 1024
    return f"{length:.4g} GiB"


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
