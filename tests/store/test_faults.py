"""Operation 1, 2, 3, … of a scenario fails or is the last; no promise of the store is broken."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from enumeration import (
    CUTS,
    FAILURES,
    OPERATIONS_MAX,
    SCRIPTS,
    Checks,
    Ledger,
    Script,
    enumerate_faults,
    scenario,
)
from simulated import FailingRealDisk, Fault

from ckptd.host.disk import RealDisk


@pytest.mark.parametrize(("how", "code"), FAILURES + CUTS)
def test_no_fault_loses_what_was_promised(how: str, code: int) -> None:
    """After any single fault, and any power cut at any later moment, the newest checkpoint whose
    publish returned is found with its exact content, and the next publish works."""
    assert enumerate_faults(Path("/run"), how, code) > 50


# One error each: the store tells no errno from another, and a real fsync takes its time.
@pytest.mark.parametrize(("how", "code"), [("once", errno.ENOSPC), ("ever", errno.EIO)])
@pytest.mark.parametrize("script", SCRIPTS, ids=["lower", "deleted"])
def test_failures_on_the_real_disk(tmp_path: Path, how: str, code: int, script: Script) -> None:
    """The same failures, without power cuts, on the operating system's file system."""
    checks = Checks(Path("/unused"))
    for n in range(1, OPERATIONS_MAX):
        run = tmp_path / str(n)
        run.mkdir()
        fault, ledger = Fault(n, how, code), Ledger()
        for _ in scenario(FailingRealDisk(fault), run / "checkpoints", ledger, script):
            pass
        checks.checkpoints = run / "checkpoints"
        checks.everything(RealDisk(), ledger, str(fault))
        shutil.rmtree(run)
        if not fault.struck:
            break
    else:
        pytest.fail("the scenario never ran clean")
