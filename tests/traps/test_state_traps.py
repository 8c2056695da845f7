"""Every kind of state that training code was seen to lose comes back, to the last bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Workshop

pytestmark = pytest.mark.real

SCRIPT = str(Path(__file__).parent / "state.py")
FAMILIES = (
    *("optimizers", "all_schedulers", "models", "training", "unfreezing"),
    *("objects", "settings"),
)
#: After how many ticks of each process in turn it is interrupted; then it is left to finish.
STRIKES = (2, 3, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(workshop: Workshop, family: str) -> None:
    """Interrupted again and again in new processes, each case does what it does plainly."""
    out, plain = workshop.path / "out", workshop.path / "plain"
    workshop.plain(sys.executable, SCRIPT, family, str(plain))
    for strike in (*STRIKES, 0):
        done = workshop.launch(sys.executable, SCRIPT, family, str(out), STRIKE=str(strike))
        assert done.returncode == (75 if strike else 0), done.stdout[-3000:] + done.stderr[-3000:]
    found, expected = out.read_text().splitlines(), plain.read_text().splitlines()
    differing = [(a, b) for a, b in zip(found, expected) if a != b]
    assert differing[:5] == []
    assert len(found) == len(expected)
