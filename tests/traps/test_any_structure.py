"""Scripts drawn at random, interrupted at random, do what they do when they are run plainly.

CKPTD_EXAMPLES=200 draws so many, anew each time, and reduces a failing one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import Workshop
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.real

SCRIPT = str(Path(__file__).parent / "anything.py")
ASKED = int(os.environ.get("CKPTD_EXAMPLES", "0"))
#: Two test functions' worth, so that two processors share them.
SEEDS = (1, 2, 3, 4)
EXAMPLES = 4

SIMPLE = st.one_of(
    st.just(["draw"]),
    st.just(["add"]),
    st.just(["train"]),
    st.sampled_from(["a", "b"]).map(lambda name: ["late", name]),
)
SMALL = st.integers(1, 3)


def bodies(statements: st.SearchStrategy) -> st.SearchStrategy:
    """What stands within a loop: with a tick, so that it is interrupted there; maybe a break."""
    breaks = st.sampled_from([[], [], [["break", 0.3]]])
    return st.tuples(st.lists(statements, max_size=3), breaks, st.lists(SIMPLE, max_size=1)).map(
        lambda parts: [*parts[0], ["tick"], *parts[1], *parts[2]]
    )


def compound(statements: st.SearchStrategy) -> st.SearchStrategy:
    """Loops around statements."""
    body = bodies(statements)
    over = st.sampled_from(["range", "list", "enumerate", "restart", "loader0", "loader1"])
    return st.one_of(
        SIMPLE,
        st.tuples(st.just("loop"), over, SMALL, body).map(list),
        st.tuples(st.just("zip"), SMALL, body).map(list),
        st.tuples(st.just("while"), st.integers(1, 2), body).map(list),
    )


LEVEL_1 = compound(SIMPLE)
LEVEL_2 = compound(LEVEL_1)
OUTER = st.tuples(
    st.just("loop"),
    st.sampled_from(["range", "list", "loader0"]),
    st.integers(2, 3),
    bodies(LEVEL_2),
).map(list)
PROGRAMS = st.tuples(st.lists(SIMPLE, max_size=1), OUTER, st.lists(LEVEL_2, max_size=2)).map(
    lambda parts: [*parts[0], parts[1], *parts[2]]
)
STRIKES = st.lists(st.integers(1, 7), min_size=2, max_size=4)


def check(program: list, strikes: list[int]) -> None:
    """Run a program plainly, and interrupted; compare what they wrote."""
    with tempfile.TemporaryDirectory(prefix="any-") as path:
        workshop = Workshop(Path(path))
        text, out, plain = (Path(path, name) for name in ("program.json", "out", "plain"))
        text.write_text(json.dumps(program))
        workshop.plain(sys.executable, SCRIPT, str(text), str(plain))
        for strike in (*strikes, 0):
            done = workshop.launch(sys.executable, SCRIPT, str(text), str(out), STRIKE=str(strike))
            assert done.returncode in (0, 75), f"{text.read_text()} {strikes}\n{done.stdout}"
            if done.returncode == 0:
                break
        assert done.returncode == 0
        assert out.read_text() == plain.read_text(), f"{text.read_text()} {strikes}"


@pytest.mark.timeout(0 if ASKED else 300)
@pytest.mark.parametrize("number", [0] if ASKED else SEEDS)
def test_any_structure(number: int) -> None:
    """Whatever loops and draws a script has, and wherever it is interrupted."""
    asked = {"max_examples": ASKED} if ASKED else {"max_examples": EXAMPLES, "phases": GENERATE}
    tested = settings(
        **asked, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )(given(PROGRAMS, STRIKES)(check))
    (tested if ASKED else seed(number)(tested))()


GENERATE = (Phase.explicit, Phase.generate)
