"""`worker/ddp.py`: a wrapper that is made anew reduces gradients as the one before it did."""

from __future__ import annotations

import sys

import pytest
from conftest import SCRIPTS, Workshop

pytestmark = pytest.mark.real


CASES = ["learns_late", "in_turns", "one_trunk", "alone", "warmed_up", "looked_at", "hooked"]


@pytest.mark.parametrize("case", CASES)
def test_brought_back(workshop: Workshop, case: str) -> None:
    """Bit for bit, in three ranks; see the script."""
    forked, script = str(SCRIPTS / "forked.py"), str(SCRIPTS / "replicas.py")
    workshop.plain(sys.executable, forked, "3", script, case)
