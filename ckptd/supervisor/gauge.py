"""What can be said of a job now: how far it is, how fast, and what an interruption would cost.

Rule: it is told when something happened, and decides nothing. All times are those of one monotonic
clock, in seconds.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from ckptd import wire
from ckptd.supervisor import machine
from ckptd.supervisor.policy import Policy, at_stake

Facts = dict[str, str | int | float | None]

_RATE_WINDOW: Final = 30


class Gauge:
    """Of one supervisor's job, over all its attempts.

    Args:
        policy: what the user set.
        now_s: when the supervisor began.
        continued: whether the job was begun before that; then its first start is a restart.
    """

    def __init__(self, policy: Policy, now_s: float, *, continued: bool) -> None:
        self._policy = policy
        self._began_s = self._started_s = now_s
        self._restarts = 0 if continued else -1
        self._from_memory = False
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)
        self._durable_s: float | None = None  # when the newest durable state was taken
        self._whole_s: float | None = None  # when the newest state in memory was taken
        self._cost_s = 0.0
        self._write_began_s = 0.0
        self._write_s: float | None = None
        #: Why the job failed last; "": it has not.
        self.last_failure = ""

    # -------------------------------------------------------------- what happened

    def started(self, now_s: float, *, from_memory: bool) -> None:
        """An attempt begins: from a state in memory, or from what is durable."""
        self._started_s, self._from_memory = now_s, from_memory
        self._restarts += 1
        self._samples.clear()

    def runs_s(self, now_s: float) -> float:
        """For how long this attempt has run."""
        return now_s - self._started_s

    def moved(self, now_s: float, step: int, *, begins: bool) -> None:
        """This is where it is; `begins`: where the attempt began, which says nothing of a rate."""
        if begins:
            self._samples.clear()
        self._samples.append((now_s, step))

    def looked_s(self) -> float | None:
        """When it was last looked at in this attempt; None: not yet."""
        return self._samples[-1][0] if self._samples else None

    def taken(self, now_s: float, cost_s: float) -> None:
        """A whole state is in memory, which held up training for so long."""
        self._whole_s, self._cost_s = now_s, cost_s

    def write_began(self, now_s: float) -> None:
        """A state is being written."""
        self._write_began_s = now_s

    def writes_for_s(self, now_s: float) -> float:
        """For how long the newest write has gone on."""
        return now_s - self._write_began_s

    def written(self, now_s: float, taken_s: float) -> float:
        """The state that was taken then is durable; for how long it was written."""
        self._durable_s = taken_s
        self._write_s = self.writes_for_s(now_s)
        return self._write_s

    # -------------------------------------------------------------- what can be said

    def facts(
        self,
        state: machine.State,
        now_s: float,
        *,
        attempt: int,
        page: wire.StatusPage | None,
        works: bool,
        ranks: str = "",
    ) -> Facts:
        """All of it, by names that `ckptd status` shows.

        Args:
            state: the machine's.
            now_s: the time.
            attempt: the attempt's number.
            page: the running attempt's; None: none runs.
            works: whether a worker is attached.
            ranks: of several ranks, how many are.
        """
        durable_s = None if self._durable_s is None else now_s - self._durable_s
        rate, values = self._rate(), {} if page is None else page.values()
        return {
            "state": type(state.phase).__name__.lower(),
            "attempt": attempt,
            "ranks": ranks or None,
            "step": 0 if page is None else int(page.words[wire.WORD_STEP]),
            "place": "" if page is None else _place(page),
            "rate": None if rate is None else round(rate, 3),
            "durable step": state.ledger.durable_step,
            "durable age s": None if durable_s is None else round(durable_s, 1),
            "restarts": max(0, self._restarts),
            "last failure": self.last_failure or None,
            "not durable because": state.ledger.failed,
            "would cost": self._at_stake(state.ledger, now_s, rate) if works else None,
            **{f"log {name}": value for name, value in values.items()},
        }

    def _rate(self) -> float | None:
        """Steps per second over the last samples."""
        if len(self._samples) < 2:  # two points make a slope
            return None
        (then_s, then), (now_s, now) = self._samples[0], self._samples[-1]
        return (now - then) / (now_s - then_s) if now > then else None

    def _at_stake(self, ledger: machine.Ledger, now_s: float, rate: float | None) -> str:
        """What an interruption would cost now."""
        runs_s = self.runs_s(now_s)
        durable_s = None if self._durable_s is None else now_s - self._durable_s
        in_memory = ledger.held is not None or ledger.writing is not None
        whole_s = now_s - self._whole_s if in_memory and self._whole_s is not None else durable_s
        if self._from_memory:
            power_s = now_s - self._began_s if durable_s is None else durable_s
        else:  # what it began with was durable, or nothing
            power_s = runs_s if durable_s is None else min(durable_s, runs_s)
        return at_stake(
            self._policy.grace_s,
            flush_s=None if self._write_s is None else self._cost_s + self._write_s,
            step_s=None if not rate else 1 / rate,
            crash_s=runs_s if whole_s is None else min(whole_s, runs_s),
            power_s=power_s,
            refused=ledger.failed is not None,
        )


def summary(facts: Facts) -> str:
    """One line for a person: "attached · 3/30 · 40/120 · step 400 · 12.3 steps/s · durable: …"."""
    words = [str(facts["state"]), str(facts["place"] or ""), f"step {facts['step']}"]
    if facts["rate"] is not None:
        words.append(f"{facts['rate']:.3g} steps/s")
    if facts["durable step"] is not None:
        words.append(f"durable: step {facts['durable step']}")
    return " · ".join(word for word in words if word)


def _place(page: wire.StatusPage) -> str:
    """Where it is in its loops: "3/30 · 40/120"."""
    parts = []
    for loop in page.loops():
        of = f"/{loop.length}" if loop.length else ""
        parts.append(f"{min(loop.done + 1, loop.length or loop.done + 1)}{of}")
    return " · ".join(parts)
