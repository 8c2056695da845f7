"""SIGKILL at random instants, 300 times and more: nothing that was reported durable is missing, and
every run ends in the plain run's bytes. See storm.py for who is killed and when.

CKPTD_KILLS=1000 asks for so many in each storm, CKPTD_SEED=77 for other storms. A storm that went
wrong prints its seed; the instants themselves are the clock's, so it may take a few tries to see it
again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

STORM = Path(__file__).parent / "storm.py"
SEED = int(os.environ.get("CKPTD_SEED", "1"))
#: Several tests' worth, so that several processors share them.
SEEDS = range(SEED, SEED + 4)
FORKED, LAUNCHED = int(os.environ.get("CKPTD_KILLS", "100")), 8
BOUND_S = 280 * max(1, FORKED // 100)


def storm(path: Path, seed: int, kills: int, *, real: bool) -> dict:
    """The account of one storm."""
    asked = json.dumps({"seed": seed, "kills": kills, "path": str(path), "real": real})
    done = subprocess.run(
        [sys.executable, str(STORM)],
        input=asked,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    account = json.loads(done.stdout)
    print(account)
    assert account["wrong"] == "", f"seed {seed}: {account}"
    return account


@pytest.mark.timeout(BOUND_S + 20)
@pytest.mark.parametrize("seed", SEEDS)
def test_storm(tmp_path: Path, seed: int) -> None:
    """Killed at random instants, at chosen disk operations and while restoring, in forks."""
    account = storm(tmp_path, seed, FORKED, real=False)
    for who in ("worker", "supervisor", "both"):
        assert account[who] > 0, account
    assert account["worker"] + account["supervisor"] + account["both"] >= FORKED


def test_storm_of_real_programs(tmp_path: Path) -> None:
    """The same, by the clock alone, with `ckptd launch` and the script as new programs."""
    account = storm(tmp_path, SEED, LAUNCHED, real=True)
    assert account["worker"] + account["supervisor"] + account["both"] >= LAUNCHED
