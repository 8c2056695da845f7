"""A power cut loses nothing that was reported durable; a store that leaves out a sync is caught.

    python -m pytest -m powercut -s tests/disks

See power_cuts.py for what is cut and what a loss is, drive.py for the drive. CKPTD_CUTS=500 asks
for so many cuts, CKPTD_SEED=77 for others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from drive import missing

CUTS, LAUNCHES, TWIN_CUTS = int(os.environ.get("CKPTD_CUTS", "60")), 15, 40
SEED = os.environ.get("CKPTD_SEED", "1")
FILE_SYSTEMS = ("ext4", "xfs")
FORGOTTEN = (
    "the files' sync",
    "the output's sync",
    "the directories' sync",
    "the parent's sync",
)
PROGRAM = str(Path(__file__).parent / "power_cuts.py")
BOUND_S = 20 * max(CUTS, TWIN_CUTS)

pytestmark = [pytest.mark.powercut, pytest.mark.timeout(BOUND_S + 60)]


def cut(file_system: str, cuts: int, *writer: str) -> dict:
    """The account of so many cuts under a writer."""
    why = missing(file_system)
    if why is not None:
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, PROGRAM, file_system, str(cuts), SEED, *writer],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    print(f"\n{file_system}, {', '.join(writer)}: {account}")
    assert account["receipts"] > 0
    return account


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_the_store(file_system: str) -> None:
    """Checkpoints that the store published, and outputs that they count on, survive."""
    account = cut(file_system, CUTS, "publisher")
    assert account["losses"] == 0, account
    assert 0 < account["kept"] < account["cached"], "the drive lost, and kept, something"


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_a_whole_launch(file_system: str) -> None:
    """What `ckptd status` called durable survives, and the next launch starts from there."""
    account = cut(file_system, LAUNCHES, "launch")
    assert account["losses"] == 0, account


@pytest.mark.parametrize("forgotten", FORGOTTEN)
@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_a_broken_twin(file_system: str, forgotten: str) -> None:
    """The same with one kind of sync left out loses something: the cuts are real."""
    assert cut(file_system, TWIN_CUTS, "publisher", forgotten)["losses"] > 0
