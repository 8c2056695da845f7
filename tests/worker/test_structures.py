"""Every loop structure, interrupted again and again, does what it does when it is run plainly."""

from __future__ import annotations

import sys

import pytest
from conftest import SCRIPTS, Workshop

pytestmark = pytest.mark.real

STRUCTURES = (
    *("nested", "siblings", "breaks", "evaluation", "streams"),
    *("numbered", "samplers", "objects", "unfreezing"),
)
#: After how many ticks of each process in turn it is interrupted; then it is left to finish.
STRIKES = ((3, 4, 2, 5), (1, 2, 6, 3))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("strikes", STRIKES)
def test_structure(workshop: Workshop, structure: str, strikes: tuple[int, ...]) -> None:
    """What the interrupted runs wrote, line by line, is what the plain run writes."""
    script, out = str(SCRIPTS / "structures.py"), workshop.path / "out"
    workshop.plain(sys.executable, script, structure, str(workshop.path / "plain"))
    codes = []
    for strike in (*strikes, 0):
        done = workshop.launch(sys.executable, script, structure, str(out), STRIKE=str(strike))
        assert done.returncode in (0, 75), done.stdout + done.stderr
        codes.append(done.returncode)
    assert codes[-1] == 0
    assert 75 in codes, "nothing was interrupted"
    assert out.read_text() == (workshop.path / "plain").read_text()
