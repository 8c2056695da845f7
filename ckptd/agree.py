"""At which safe point several ranks flush: decided from where each of them is.

A checkpoint of several ranks is one only if all took it at the same place of the script, with every
collective between them done by all or by none. No rank waits for another one there, since that
other may be within a collective that needs the first.

Rules:

1. Pure: positions in, a position out.
2. A position is the chain of open loops, outermost first: for each the how-manieth loop it is
   within the item around it, and how many of its items are done. Compared as tuples, positions
   follow the order in which a script that is the same on all ranks comes to them.
3. First all are asked to stand still at their next safe point. A rank that has passed one just
   before it saw that is within the item after it, and stands still at the end of that. So from
   then on no rank gets further than one item beyond what is read of it.
4. The target is the end of the item in which the furthest rank is: nobody has passed it, and all
   come to it. A rank flushes at its first safe point that is not before the target.
5. A rank that is between two loops of an item in which the furthest one is in a loop may be before
   that loop, or behind it, or not have it at all (an evaluation by one rank alone). Then it is
   better to ask again a little later: all come to the end of the outer item, but it may be far.

The method is that of TensorFlow's preemption sync manager (publish the notice, freeze and read
every task's step counter, take the largest plus one), with positions in place of counters, and the
counters in shared memory, where they can be read while a rank is within a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: From when on a request that was written into a page is certainly seen (rule 3): what a processor
#: has written reaches the others within microseconds.
SEEN_S: Final = 0.002
#: How often to ask again rather than to agree upon the end of an outer loop's item (rule 5).
PATIENT_TRIES: Final = 8

#: Per open loop, outermost first: which loop of the item around it, and how many items are done.
Position = tuple[tuple[int, int], ...]


def target(positions: Sequence[Position], *, patient: bool) -> Position | None:
    """At or after which position every rank flushes, at its first safe point there.

    Args:
        positions: where each rank is.
        patient: rather ask again than wait for the end of an outer loop's item.

    Returns:
        None: not now; let them go on, and ask again.
    """
    furthest = max(positions)
    between = [one for one in positions if one != furthest and furthest[: len(one)] == one]
    if between and patient:
        return None
    within = min(between, key=len, default=furthest)
    if not within:
        return None  # it is before the first loop
    *outer, (ordinal, done) = within
    return (*outer, (ordinal, done + 1))


def is_far(target: Position, positions: Sequence[Position]) -> bool:
    """Whether it is the end of an item that the furthest rank has a loop in, so may be far away."""
    return len(target) < len(max(positions))
