"""Where a drill interrupts: moments chosen from the safe points of an uninterrupted run."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ckptd import record
from ckptd.errors import UsageError
from ckptd.record import Seen, Strike

#: A worker is killed at most this many safe points after the checkpoint that it goes back to.
_REDONE_MAX = 3


def choose(
    seen: Sequence[Seen], *, count: int, kinds: Sequence[str], seed: int, steps: Sequence[int]
) -> list[Strike]:
    """The strikes, in the order in which the script will come by them.

    A moment is where the job is resumed. So a kill is two strikes: at the moment a checkpoint, and
    the kill some safe points later.

    The first is within a loop, the second at the end of an inner one (what only exists within that
    loop is missed there), the third within a loop, the fourth anywhere, and so on.

    Args:
        seen: the marks of the uninterrupted run.
        count: how many interruptions.
        kinds: what to interrupt with, in turn.
        seed: decides about the moments.
        steps: instead of random moments: the steps at which to interrupt; `count` is not used.

    Raises:
        UsageError: the run has no such step, or no safe point at all.
    """
    points = [i for i, one in enumerate(seen) if one.mark.strikable]
    if not points:
        raise UsageError(
            "the script came by no safe point: nothing of it can be interrupted. "
            "Iterate over `job.loop(…)`"
        )
    chosen = _at_steps(seen, points, steps) if steps else _at_random(seen, points, count, seed)
    strikes: list[Strike] = []
    for number, index in enumerate(chosen):
        how = kinds[number % len(kinds)]
        killed = None
        if how == record.KILL:
            until = chosen[number + 1] if number + 1 < len(chosen) else len(seen)
            killed = _killed_at(seen, [i for i in points if index < i < until], index)
        if killed is not None:
            strikes.append(_strike(seen[index], record.CHECKPOINT))
        strikes.append(_strike(seen[index if killed is None else killed], how))
    return strikes


def _killed_at(seen: Sequence[Seen], after: list[int], index: int) -> int | None:
    """Where to kill a worker so that it resumes at `index` and does some steps again."""
    step = seen[index].mark.step
    later = [i for i in after if seen[i].mark.step > step] or after
    return later[min(_REDONE_MAX, len(later)) - 1] if later else None


def _at_steps(seen: Sequence[Seen], points: list[int], steps: Sequence[int]) -> list[int]:
    chosen = []
    for step in sorted(set(steps)):
        found = [i for i in points if seen[i].mark.step == step]
        if not found:
            last = max(seen[i].mark.step for i in points)
            raise UsageError(f"--at {step}: the script has no safe point there, only 0 to {last}")
        chosen.append(found[0])
    return chosen


def _at_random(seen: Sequence[Seen], points: list[int], count: int, seed: int) -> list[int]:
    """In turn: within a loop, at the end of an inner loop, within a loop, anywhere."""
    generator = random.Random(seed)  # noqa: S311  # moments are no secret
    middles = [i for i in points if _is_middle(seen, i)]
    inner_ends = [i for i in points if _is_inner_end(seen[i].mark.key)]
    chosen: set[int] = set()
    for number in range(min(count, len(points))):
        wished = (middles, inner_ends, middles, points)[number % 4]
        free = [i for i in wished if i not in chosen] or [i for i in points if i not in chosen]
        chosen.add(generator.choice(free))
    return sorted(chosen)


def _is_middle(seen: Sequence[Seen], index: int) -> bool:
    """Whether some items of an innermost loop are done and others not."""
    mark, following = seen[index].mark, seen[index + 1 : index + 2]
    return (
        mark.key.endswith(" item")
        and not mark.key.endswith(":0 item")
        and bool(following)
        and following[0].mark.step > mark.step
    )


def _is_inner_end(key: str) -> bool:
    return key.endswith(" end") and "/" in key


def _strike(seen: Seen, how: str) -> Strike:
    return Strike(seen.mark.key, how, seen.mark.step)
