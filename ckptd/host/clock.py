"""Durations and the time of day."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the supervisor knows of time."""

    def now_s(self) -> float:
        """Seconds on a clock that never jumps."""

    def wall_s(self) -> float:
        """Seconds since 1970: a label for people, never subtracted."""


class RealClock:
    """The operating system's clocks."""

    def now_s(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def wall_s(self) -> float:
        """See `Clock`."""
        return time.time()
