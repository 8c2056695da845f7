"""A run's directory is made and replaced so that no crash and no power cut loses a run, and that no
old copy of it may publish into the new one."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

import pytest
from simulated import Fault, PowerCut, SimulatedDisk

from ckptd.errors import FencedError
from ckptd.host.disk import RealDisk
from ckptd.store import fence
from ckptd.supervisor import run as runs
from ckptd.supervisor.run import Run

ROOT = Path("/root")
RUN = Run(ROOT / "deep" / "runs" / "job")


def test_a_new_run_survives_a_power_cut() -> None:
    """When `create` has returned, the run's directory is there after any power cut."""
    disk = SimulatedDisk(ROOT)
    runs.create(RUN, disk)
    for survivor in disk.survivors(0):
        assert survivor.names(RUN.path.parent) == ["job"]
    runs.create(RUN, disk)  # the second launch


@pytest.mark.parametrize("how", ["once", "cut", "cut within"])
def test_a_later_launch_makes_it_durable(how: str) -> None:
    """The first launch failed or was killed before its directory was durable: after a later one
    it is."""
    for at in itertools.count(1):
        disk = SimulatedDisk(ROOT)
        disk.make_directory(ROOT / "deep")
        disk.make_directory(RUN.path.parent)
        disk.sync_directory(ROOT / "deep")
        disk.sync_directory(ROOT)
        disk.fault = Fault(at, how)
        with suppress(OSError, PowerCut):
            runs.create(RUN, disk)
        struck, disk.fault = disk.fault.struck, Fault()
        runs.create(RUN, disk)  # no power cut yet: what was not synced is still there
        assert all(one.names(RUN.path.parent) == ["job"] for one in disk.survivors(at)), f"{at=}"
        if not struck:
            break


def begun() -> SimulatedDisk:
    """A run with seven attempts and something to lose, durable."""
    disk = SimulatedDisk(ROOT)
    runs.create(RUN, disk)
    for _ in range(7):
        fence.claim(disk, RUN.path, "old")
    disk.write(RUN.path / "log", b"old")
    disk.sync(RUN.path / "log")
    disk.sync_directory(RUN.path)
    return disk


def test_numbers_go_on(tmp_path: Path) -> None:
    """The run that takes the old one's place has larger numbers from its first moment on; the old
    one is kept, whole, each time."""
    disk, run = RealDisk(), Run(tmp_path / "job")
    runs.create(run, disk)
    numbers = []
    for number in (1, 2, 3):
        numbers.append(fence.claim(disk, run.path, "old"))
        assert runs.set_old_aside(run, disk) == tmp_path / f"job.old-{number}"
        with pytest.raises(FencedError):
            fence.check(disk, run.path, numbers[-1])
        assert disk.names(run.path) == ["attempts"]
    assert disk.names(tmp_path) == ["job", "job.old-1", "job.old-2", "job.old-3"]
    later = fence.claim(disk, run.path, "new")
    assert [*numbers, later] == sorted({*numbers, later})
    fence.check(disk, run.path, later)


@pytest.mark.parametrize("how", ["once", "cut", "cut within"])
def test_no_fault_resets_the_numbers(how: str) -> None:
    """Whatever fails or is cut while a run is replaced: the old one is there whole, under one of
    two names, and the next launch's number is larger than any before."""
    for at in itertools.count(1):
        disk = begun()
        disk.fault = Fault(at, how)
        with suppress(OSError, PowerCut):
            runs.set_old_aside(RUN, disk)
        for found in [*disk.survivors(at), disk.copy()]:
            logs = [
                name
                for name in found.names(RUN.path.parent)
                if "log" in found.names(RUN.path.parent / name)
            ]
            assert logs in (["job"], ["job.old-1"]), f"{at=}"
            runs.create(RUN, found)
            assert fence.claim(found, RUN.path, "new") > 7, f"{at=}"
            with pytest.raises(FencedError):
                fence.check(found, RUN.path, 7)
            again = runs.set_old_aside(RUN, found)
            assert again.name.startswith("job.old-"), f"{at=}"
        if not disk.fault.struck:
            break
    assert at > 10
