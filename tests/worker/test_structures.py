"""Every loop structure, interrupted again and again, does what it does when it is run plainly."""

from __future__ import annotations

import sys

import pytest
from conftest import SCRIPTS, Workshop

pytestmark = pytest.mark.real

STRUCTURES = (
    *("nested", "siblings", "breaks", "evaluation", "late_evaluation", "streams"),
    *("numbered", "samplers", "objects", "unfreezing"),
)
#: After how many ticks of each process in turn it is interrupted; then it is left to finish.
STRIKES = ((3, 4, 2, 5), (2, 3, 1, 6))
#: All, in the ordinary run every other one.
CASES = [
    pytest.param(structure, strikes, marks=[pytest.mark.nightly] if (i + j) % 2 else [])
    for i, structure in enumerate(STRUCTURES)
    for j, strikes in enumerate(STRIKES)
]


@pytest.mark.parametrize(("structure", "strikes"), CASES)
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


def test_a_signal_to_the_group(workshop: Workshop) -> None:
    """SIGTERM to the process group, loader workers included, loses nothing."""
    script, out = str(SCRIPTS / "structures.py"), workshop.path / "out"
    workshop.plain(sys.executable, script, "samplers", str(workshop.path / "plain"))
    argv = sys.executable, script, "samplers", str(out)
    struck = workshop.launch(*argv, STRIKE="3", STRIKE_GROUP="1")
    assert struck.returncode == 75, struck.stdout + struck.stderr
    assert "Traceback" not in struck.stdout
    assert workshop.launch(*argv).returncode == 0
    assert out.read_text() == (workshop.path / "plain").read_text()


def test_behind_torchrun(workshop: Workshop) -> None:
    """The request reaches a worker behind torchrun, whose own exit code is not trusted."""
    script, out = str(SCRIPTS / "structures.py"), workshop.path / "out"
    workshop.plain(sys.executable, script, "numbered", str(workshop.path / "plain"))
    launcher = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"
    argv = *launcher, script, "numbered", str(out)
    struck = workshop.launch(*argv, STRIKE="3", STRIKE_SUPERVISOR="1")
    assert struck.returncode == 75, struck.stdout + struck.stderr
    assert workshop.launch(*argv).returncode == 0
    assert out.read_text() == (workshop.path / "plain").read_text()
