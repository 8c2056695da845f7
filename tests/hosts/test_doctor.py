"""What `ckptd doctor` finds: everything in order, and each thing that is not, with its mending."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import psutil
import pytest
from conftest import Workshop
from launched import fake

from ckptd.host import memory, systemd
from ckptd.host.disk import RealDisk
from ckptd.host.host import Plain
from ckptd.supervisor import doctor
from ckptd.supervisor import run as runs
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.run import Run


def mended(findings: object) -> list[str]:
    """What should be mended, of some findings."""
    return [one.what for one in findings if one.mend is not None]  # type: ignore[attr-defined]


@pytest.fixture
def run(workshop: Workshop) -> Run:
    """A run with checkpoints."""
    done = workshop.launch(*fake("--total", "30"), options=("--every", "0.01"))
    assert done.returncode == 0, done.stderr
    return Run(workshop.path / "runs/job")


def test_a_sound_machine(tmp_path: Path) -> None:
    """Nothing is left behind by looking."""
    assert mended(doctor.of_directory(tmp_path / "not/there/yet")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_other_nodes_do_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at only where there are others; the innermost mount counts."""

    def mounted(*kinds: str) -> None:
        places = ["/", str(tmp_path.parent), str(tmp_path / "elsewhere")]
        mounts = [SimpleNamespace(mountpoint=p, fstype=k) for p, k in zip(places, kinds)]
        monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)

    mounted("nfs4", "ext4", "nfs4")
    assert mended(doctor.of_directory(tmp_path)) == []
    (found,) = mended(doctor.of_directory(tmp_path / "runs", nodes=2))
    assert "is on ext4" in found
    mounted("ext4", "lustre", "ext4")
    assert mended(doctor.of_directory(tmp_path / "runs", nodes=2)) == []


@pytest.mark.parametrize("line", ["torchrun --max-restarts=3 train.py", "srun torchrun train.py"])
def test_a_launcher_that_starts_ranks_again(tmp_path: Path, line: str) -> None:
    """Also within a line for a shell."""
    run = Run(tmp_path / "run")
    runs.create(run, RealDisk())
    argv = ["bash", "-c", f"exec {line}"]
    run.write(runs.describe_job("run", argv, tmp_path, os.environ, "1"))
    found = mended(doctor.of_run(run, 2, 30.0))
    assert [text.split()[1] for text in found] == ["--max-restarts"] * ("=3" in line)


def test_locks_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (lambda *_, **__: True, lambda *_, **__: False):
        monkeypatch.setattr(filelock, "lock_descriptor", answer)
        (found,) = mended(doctor.of_directory(tmp_path))
        assert "two copies of a job could run" in found


def test_what_is_only_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and nothing has to be mended."""
    monkeypatch.setattr(RealDisk, "link", lambda *_: False)
    found = list(doctor.of_directory(tmp_path))
    assert mended(found) == []
    assert "also what did not change is written again" in str(found)


def test_a_directory_that_cannot_be_written() -> None:
    (found,) = mended(doctor.of_directory(Path("/proc/runs")))
    assert "can't be written" in found


def test_nobody_starts_it_again(tmp_path: Path) -> None:
    """No service; one that starts only at log-in."""
    jobs = Registry({"XDG_STATE_HOME": str(tmp_path)})
    for config in ({"HOME": str(tmp_path)}, {"XDG_CONFIG_HOME": str(tmp_path / "elsewhere")}):
        units = systemd.user_units(config)
        (found,) = mended(doctor.of_host(Plain(), jobs, units))
        assert "after a reboot" in found
        units.mkdir(parents=True)
        (units / "ckptd.service").touch()
        assert "lingering" in mended(doctor.of_host(Plain(), jobs, units))[1]


def test_a_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for two states, space for its checkpoints, time within the grace."""
    assert mended(doctor.of_run(run, 3, 30.0)) == []
    (slow,) = mended(doctor.of_run(run, 3, 1e-6))
    assert slow.startswith("time:")
    monkeypatch.setattr(memory, "available", lambda: 1)
    (short,) = mended(doctor.of_run(run, 3, 30.0))
    assert short.startswith("memory:")
    (space,) = mended(doctor.of_run(run, 10**15, 30.0))[1:]
    assert space.startswith("space:")


def test_the_command(run: Run) -> None:
    """Exit code 1, and a line that mends what was found."""
    done = subprocess.run(
        [sys.executable, "-m", "ckptd", "doctor", "--dir", str(run.path.parent), run.path.name],
        env={**os.environ, "XDG_STATE_HOME": str(run.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "mend it: ckptd install-service" in done.stdout
    assert "ok    locks: one copy of a job at a time" in done.stdout


def test_it_goes_by_how_the_run_was_launched(workshop: Workshop) -> None:
    """And not by the defaults."""
    options = ("--grace", "77", "--keep", "2", "--memory-tier", "off", "--every", "0.01")
    done = workshop.launch(*fake("--total", "30"), options=options)
    assert done.returncode == 0, done.stderr
    words = ["doctor", "--dir", str(workshop.path / "runs"), "job"]
    told = subprocess.run(
        [sys.executable, "-m", "ckptd", *words],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert "the grace is 77 s" in told
    assert "2 checkpoints fit" in told
    assert doctor.launched_with(Run(workshop.path / "runs/job"))["--memory-tier"] == "off"


def test_a_run_that_was_launched_without_options(workshop: Workshop) -> None:
    """As most are: the defaults hold."""
    head = [sys.executable, "-m", "ckptd"]
    script = workshop.path / "train.py"
    script.write_text("")
    launch = [*head, "launch", "--", sys.executable, str(script)]
    environment = workshop.environment()
    subprocess.run(launch, cwd=workshop.path, env=environment, check=True)
    assert doctor.launched_with(Run(workshop.path / "ckptd-runs/train")) == {}
    told = subprocess.run(
        [*head, "doctor", "train"],
        cwd=workshop.path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not told.stderr
    assert "nothing is known of what it needs" in told.stdout
