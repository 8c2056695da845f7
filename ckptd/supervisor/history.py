"""A run's life, read from its journal: attempts, why each ended, what the time went to. Pure.

Times are those of the machine's clock at each event. Where that was set meanwhile, or the run moved
to another machine, what is computed from them is as wrong as the clocks are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckptd.supervisor.policy import described

Event = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One start of the command.

    Attributes:
        began: seconds since 1970.
        waited_s: from the end of the one before.
        starting_s: until its worker had everything restored.
        training_s: after that, until it was asked to stop or ended.
        flushing_s: from the request to stop to the end.
        written_s: for how long checkpoints were being written beside the training.
        from_step: where it started.
        to_step: where it ended; None: nobody saw it (its supervisor was killed, the power failed).
        lost_steps: steps that the next one had to do again, or would have to; None: not known.
        end: why it ended.
    """

    number: int
    began: float
    waited_s: float
    starting_s: float
    training_s: float
    flushing_s: float
    written_s: float
    from_step: int
    to_step: int | None
    lost_steps: int | None
    end: str

    @property
    def lost_s(self) -> float:
        """Training that had to be done again, in seconds."""
        done = None if self.to_step is None else self.to_step - self.from_step
        if not done or not self.lost_steps:
            return 0.0
        return self.training_s * min(1.0, self.lost_steps / done)


@dataclass(frozen=True)
class Life:
    """All attempts of a run so far."""

    attempts: list[Attempt]

    @property
    def total_s(self) -> float:
        """From the first start to the last event."""
        return sum(
            one.waited_s + one.starting_s + one.training_s + one.flushing_s for one in self.attempts
        )

    @property
    def goodput(self) -> float | None:
        """The share of that time which was training that counted; None: no time has passed."""
        good_s = sum(one.training_s - one.lost_s for one in self.attempts)
        return good_s / self.total_s if self.total_s > 0 else None


def life(events: Sequence[Event], now: float | None = None) -> Life:
    """A run's life.

    Args:
        events: its journal, oldest first.
        now: seconds since 1970, if its last attempt runs; None: nothing runs.
    """
    chapters = list(_chapters(events))
    attempts: list[Attempt] = []
    ended: float | None = None
    for number, chapter in enumerate(chapters):
        following = chapters[number + 1][0] if number + 1 < len(chapters) else None
        attempt, ended = _attempt(chapter, following, ended, now)
        attempts.append(attempt)
    return Life(attempts)


def _chapters(events: Sequence[Event]) -> Iterator[list[Event]]:
    """The events of each attempt, "started" first."""
    chapter: list[Event] = []
    for event in events:
        if event["event"] == "started":
            if chapter:
                yield chapter
            chapter = [event]
        elif chapter:
            chapter.append(event)
    if chapter:
        yield chapter


def _attempt(
    chapter: list[Event], following: Event | None, ended: float | None, now: float | None
) -> tuple[Attempt, float]:
    """One attempt, and when it ended."""
    started, exited = chapter[0], _find(chapter, "exited")
    hang, ended_by = _find(chapter, "hang"), exited or _find(chapter, "killed")
    runs = following is None and now is not None and ended_by is None
    end_t = float(ended_by["t"] if ended_by else now if runs and now else chapter[-1]["t"])
    ready = _find(chapter, "restored") or _find(chapter, "attached")
    ready_t = min(float(ready["t"]), end_t) if ready else end_t
    asked = _find(chapter, "asked to stop") or hang
    asked_t = min(max(float(asked["t"]), ready_t), end_t) if asked else end_t
    from_step = started.get("step") or 0
    # What hung was seen to stand still, and is killed without a word of its own.
    seen = ended_by or (None if runs else hang)
    to_step = None if seen is None else int(seen["step"])
    lost = None
    if to_step is not None:
        lost = max(0, to_step - _goes_on_at(chapter, to_step, following))
    attempt = Attempt(
        number=int(started["attempt"]),
        began=float(started["t"]),
        waited_s=0.0 if ended is None else max(0.0, started["t"] - ended),
        starting_s=max(0.0, ready_t - started["t"]),
        training_s=max(0.0, asked_t - ready_t),
        flushing_s=max(0.0, end_t - asked_t),
        written_s=sum(one.get("seconds", 0.0) for one in chapter if one["event"] == "durable"),
        from_step=from_step,
        to_step=to_step,
        lost_steps=lost,
        end=_why(chapter, ended_by, runs=runs),
    )
    return attempt, end_t


def _goes_on_at(chapter: list[Event], to_step: int, following: Event | None) -> int:
    """The step from which the next attempt starts, or will start when there is one."""
    if following is not None:
        return following.get("step") or 0
    if _find(chapter, "finished") is not None:
        return to_step
    durable = [int(event["step"]) for event in chapter if event["event"] == "durable"]
    return max(durable, default=chapter[0].get("step") or 0)


def _why(chapter: list[Event], ended_by: Event | None, *, runs: bool) -> str:
    if runs:
        return "it runs"
    for event in reversed(chapter):
        if event["event"] in ("finished", "gave up", "fenced"):
            return str(event["event"])
    hang, asked = _find(chapter, "hang"), _find(chapter, "asked to stop")
    if hang is not None:
        return f"a hang: no progress for {hang['seconds']:.0f} s"
    if asked is not None:
        return f"stopped: {asked['by']}"
    if ended_by is None:
        return "its supervisor was killed, or the machine went down"
    if ended_by["event"] == "killed":
        return "killed"
    cause = ended_by.get("cause")
    return described(ended_by["code"]) + (f": {cause}" if cause else "")


def _find(chapter: list[Event], name: str) -> Event | None:
    return next((event for event in chapter if event["event"] == name), None)
