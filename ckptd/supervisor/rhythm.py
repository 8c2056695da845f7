"""How long a job may go without progress: learned from the job itself. Pure.

Rules:

1. Killing a job that would have gone on costs more than waiting a while longer for one that hangs.
   So the limit is far above everything that was seen, and at least half an hour.
2. Only time counts in which the job was watched and could run. A job that was stopped (SIGSTOP, a
   debugger), a suspended machine and a supervisor that was stopped itself are no hang.
3. The first step of an attempt (compilation, data that is read in) tells nothing about the others,
   and has four times as long.
4. What was taken for a hang may have been a long evaluation: until the job got past that step, the
   next limit is twice as long.
"""

from __future__ import annotations

from typing import Final

LIMIT_S_MIN: Final = 1800.0
_TIMES_LONGEST: Final = 20.0
_FIRST_STEP: Final = 4.0
#: Between two looks that are further apart nobody watched.
_LOOK_S_MAX: Final = 5.0


class Rhythm:
    """Watches one job's progress over all its attempts.

    Args:
        hang_after_s: the limit that the user set; infinite: never; None: learned.
    """

    def __init__(self, hang_after_s: float | None = None) -> None:
        self._set_s = hang_after_s
        self._longest_s = 0.0
        self._hangs = 0
        self._hung_at = 0
        self.started()

    def started(self) -> None:
        """A new attempt begins."""
        self._progress: tuple[int, int] | None = None
        self._seen_s: float | None = None
        self._idle_s = 0.0
        self._first = True

    def alive(self) -> None:
        """There was a sign of life that is no step."""
        self._idle_s = 0.0

    def look(self, now_s: float, step: int, items: int, *, first: bool, stopped: bool) -> None:
        """What there is to be seen now; to be called every second or so.

        Args:
            now_s: the monotonic clock.
            step: where the job is.
            items: done in the loops that are open now, evaluations among them.
            first: whether its first step is not done yet.
            stopped: whether it can't run now.
        """
        passed_s = 0.0 if self._seen_s is None else now_s - self._seen_s
        self._seen_s = now_s
        if passed_s <= _LOOK_S_MAX and not stopped:
            self._idle_s += passed_s
        if (step, items) != self._progress:
            if not self._first:
                self._longest_s = max(self._longest_s, self._idle_s)
            self._progress, self._first = (step, items), first
            self._idle_s = 0.0
            self._hangs = 0 if step > self._hung_at else self._hangs

    @property
    def idle_s(self) -> float:
        """For how long it could have got somewhere and did not, in seconds."""
        return self._idle_s

    @property
    def limit_s(self) -> float:
        """For how long it may."""
        limit_s = self._set_s
        if limit_s is None:
            limit_s = max(LIMIT_S_MIN, _TIMES_LONGEST * self._longest_s) * 2.0**self._hangs
        return _FIRST_STEP * limit_s if self._first else limit_s

    def hangs(self) -> bool:
        """Whether it is over the limit; true once."""
        if self._idle_s <= self.limit_s:
            return False
        self._hangs += 1
        self._hung_at = 0 if self._progress is None else self._progress[0]
        self._idle_s = 0.0
        return True
