"""What the time of a run went to, from its journal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import Workshop
from launched import fake

from ckptd.supervisor.history import life


def at(t: float, event: str, **fields: object) -> dict[str, object]:
    return {"t": t, "event": event, **fields}


#: A crash that cost 20 of 100 steps, a stop, a supervisor that was killed, and one that runs.
EVENTS = [
    at(0, "started", attempt=1, step=None),
    at(10, "attached", attempt=1),
    at(50, "durable", step=80, seconds=2.0),
    at(110, "exited", code=-9, step=100, cause="out of memory"),
    at(120, "started", attempt=2, step=80),
    at(130, "attached", attempt=2),
    at(140, "restored", step=80, seconds=1.0),
    at(240, "asked to stop", by="SIGTERM"),
    at(250, "exited", code=75, step=180),
    at(250, "stopped", code=75, text="stopped"),
    at(1250, "started", attempt=3, step=180),
    at(1260, "attached", attempt=3),
    at(1300, "durable", step=200, seconds=2.0),
    at(1310, "started", attempt=4, step=200),
    at(1320, "attached", attempt=4),
]


def test_a_life() -> None:
    """Each attempt's waiting, starting, training and flushing; the goodput is of all the time."""
    lived = life(EVENTS, now=1420)
    assert [one.waited_s for one in lived.attempts] == [0, 10, 1000, 10]
    assert [one.starting_s for one in lived.attempts] == [10, 20, 10, 10]
    assert [one.training_s for one in lived.attempts] == [100, 100, 40, 100]
    assert [one.flushing_s for one in lived.attempts] == [0, 10, 0, 0]
    assert [one.written_s for one in lived.attempts] == [2, 0, 2, 0]
    assert [one.lost_steps for one in lived.attempts] == [20, 0, None, None]
    assert [one.lost_s for one in lived.attempts] == [20, 0, 0, 0]
    assert lived.total_s == 1420
    assert lived.goodput == (100 + 100 + 40 + 100 - 20) / 1420
    assert [one.end for one in lived.attempts] == [
        "signal 9 (SIGKILL): out of memory",
        "stopped: SIGTERM",
        "its supervisor was killed, or the machine went down",
        "it runs",
    ]


#: Three that were killed: by a hang, at a stop's deadline, and because of a newer copy.
KILLED = [
    at(0, "started", attempt=1, step=None),
    at(10, "attached", attempt=1),
    at(60, "durable", step=50, seconds=1.0),
    at(100, "hang", step=70, seconds=30.0),
    at(120, "killed", step=70),
    at(130, "started", attempt=2, step=50),
    at(140, "attached", attempt=2),
    at(240, "asked to stop", by="SIGTERM"),
    at(270, "killed", step=150),
    at(271, "durable", step=120, seconds=1.0),
    at(271, "stopped", code=75, text="stopped"),
    at(300, "started", attempt=3, step=120),
    at(310, "attached", attempt=3),
    at(350, "durable", step=160, seconds=1.0),
    at(360, "killed", step=175),
    at(360, "fenced", code=69, text="fenced"),
]


@pytest.mark.parametrize("with_events", [True, False])
def test_killed(with_events: bool) -> None:
    """Whoever is killed leaves no exit status: where it was, and what that cost, is known all the
    same. A journal that knows no killings has at least the hang's step."""
    events = [e for e in KILLED if with_events or e["event"] != "killed"]
    lived = life(events)
    assert [one.end for one in lived.attempts] == [
        "a hang: no progress for 30 s",
        "stopped: SIGTERM",
        "fenced",
    ]
    known = (
        [(70, 20), (150, 30), (175, 15)] if with_events else [(70, 20), (None,) * 2, (None,) * 2]
    )
    assert [(one.to_step, one.lost_steps) for one in lived.attempts] == known
    if with_events:
        assert [one.flushing_s for one in lived.attempts] == [20, 30, 0]


def test_an_end_that_nobody_follows() -> None:
    """Given up on, or waiting to be started: what is newer than the newest checkpoint is lost.
    What has finished has lost nothing."""
    crashed = [
        at(0, "started", attempt=1, step=None),
        at(10, "attached", attempt=1),
        at(20, "durable", step=30, seconds=1.0),
        at(40, "exited", code=1, step=40),
        at(40, "gave up", code=70, text=""),
    ]
    assert life(crashed).attempts[0].lost_steps == 10
    finished = [*crashed[:3], at(40, "exited", code=0, step=40), at(40, "finished", code=0)]
    assert life(finished).attempts[0].lost_steps == 0


def test_nothing_happened() -> None:
    """A journal without a start, a clock that was set back: nothing is divided by zero."""
    assert life([]).goodput is None
    assert life([at(5, "set aside")]).attempts == []
    back = [at(100, "started", attempt=1, step=None), at(50, "exited", code=0, step=3)]
    assert life(back).goodput is None


def test_the_command(workshop: Workshop) -> None:
    """A run that crashed once and then finished."""
    done = workshop.launch(*fake("--total", "9", "--life", "4", "--lives", "1"))
    assert done.returncode == 0, done.stderr
    words = [sys.executable, "-m", "ckptd", "history", "--dir", str(workshop.path / "runs"), "job"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "signal 9 (SIGKILL)" in shown.stdout
    assert "finished" in shown.stdout
    assert "goodput" in shown.stdout
