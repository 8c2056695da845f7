"""Simulated worlds: thousands of lives of a job, and a stop before every single event of one."""

from __future__ import annotations

import pytest
from world import World

from ckptd.supervisor import machine as m

SEEDS = 30_000


@pytest.mark.parametrize("block", range(10))
def test_worlds(block: int) -> None:
    """In every world the promises hold: never two commands, never past the limit, a durable report
    is never taken back, nothing in memory is lost track of, and it always ends."""
    codes = {
        World(seed).run().code for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10)
    }
    assert len(codes) > 3, "the worlds are all alike"


@pytest.mark.parametrize("stop", [m.TERM, m.INT, m.USR1, m.HUP])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_stop_before_every_event(stop: int, seed: int) -> None:
    """A stop before the 1st, 2nd, 3rd … event: it always ends in time, and in order."""
    last = World(seed, stop_before=10**9).run().facts
    for number in range(1, last + 1):
        World(seed, stop_before=number, stop=stop).run()
