"""`worker/ddp.py`: a wrapper that is made anew reduces gradients as the one before it did."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import BOUND_S, SCRIPTS, Workshop

pytestmark = pytest.mark.real


CASES = ["learns_late", "in_turns", "one_trunk", "alone", "warmed_up", "looked_at", "hooked"]


@pytest.mark.parametrize("case", CASES)
def test_brought_back(workshop: Workshop, case: str) -> None:
    """Bit for bit, in three ranks; see the script."""
    argv = [sys.executable, str(SCRIPTS / "replicas.py"), case]
    done = subprocess.run(
        argv,
        cwd=workshop.path,
        env=workshop.environment(),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
