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
WITH_LOADERS = 30
BOUND_S = 280 * max(1, FORKED // 100)


def storm(path: Path, seed: int, kills: int, *, epochs: int, workers: int, real: bool) -> dict:
    """The account of one storm."""
    kind = {"epochs": epochs, "workers": workers, "real": real}
    asked = json.dumps({"seed": seed, "kills": kills, "path": str(path), **kind})
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


def total(account: dict) -> int:
    return account["worker"] + account["supervisor"] + account["both"]


@pytest.mark.timeout(BOUND_S + 20)
@pytest.mark.parametrize("seed", SEEDS)
def test_storm(tmp_path: Path, seed: int) -> None:
    """Killed at random instants, at chosen disk operations and while restoring, in forks."""
    account = storm(tmp_path, seed, FORKED, epochs=10, workers=0, real=False)
    for who in ("worker", "supervisor", "both"):
        assert account[who] > 0, account
    assert total(account) >= FORKED


def test_storm_with_loader_workers(tmp_path: Path) -> None:
    """The same with a process that loads data, which dies with its parent, sooner or later."""
    account = storm(tmp_path, SEED, WITH_LOADERS, epochs=4, workers=1, real=False)
    assert total(account) >= WITH_LOADERS


def test_storm_of_real_programs(tmp_path: Path) -> None:
    """The same, by the clock alone, with `ckptd launch` and the script as new programs."""
    account = storm(tmp_path, SEED, LAUNCHED, epochs=60, workers=0, real=True)
    assert total(account) >= LAUNCHED
