"""Jobs that go on by themselves: in the background, after their supervisor is gone, all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import BOUND_S, Workshop, wait_until
from launched import Launched, fake, logged

from ckptd.cli import install_service
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.run import Run

UNITS = Path(__file__).parents[2] / "systemd"
OF_ADA = "/home/ada/venv/bin/ckptd"


@pytest.fixture(autouse=True)
def own_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user with no jobs yet, of whom no process is left."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(tmp_path):
                process.kill()


def ckptd(workshop: Workshop, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A ckptd command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ckptd", *words],
        cwd=workshop.path,
        env=workshop.environment(**more),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


def to_go_on() -> list[str]:
    return sorted(run.path.name for run in Registry(os.environ).runs())


def run_of(workshop: Workshop, name: str = "job") -> Run:
    return Run(workshop.path / "runs" / name)


def attached(workshop: Workshop, name: str = "job") -> int:
    """How many of a run's attempts had a worker so far."""
    return sum(event["event"] == "attached" for event in workshop.journal(name))


class Resuming:
    """`ckptd resume --all`, while it runs."""

    def __init__(self, workshop: Workshop, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ckptd", "resume", "--all", *options],
            cwd="/",
            env=workshop.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []

    def wait_for(self, text: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} was never said: {self.said}")

    def ends(self, *signals: int) -> int:
        for number in signals:
            self.process.send_signal(number)
        assert self.process.stderr is not None
        self.said += self.process.stderr.readlines()
        return self.process.wait(BOUND_S)


def test_what_goes_on(workshop: Workshop) -> None:
    """A killed supervisor's job does; one that finished, and one that its owner stopped, do not."""
    launched = Launched(workshop, *fake("--total", "9"))
    launched.wait_for("step 5")
    assert to_go_on() == ["job"]
    assert launched.ends() == 0
    assert to_go_on() == []

    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        name = f"job{stop}"
        launched = Launched(workshop, *fake(), options=("--name", name))
        launched.wait_for("step 5")
        launched.signal(stop).ends()
    assert to_go_on() == [f"job{signal.SIGTERM}", f"job{signal.SIGKILL}"]
    stopped = ckptd(workshop, "stop", "--dir", "runs", f"job{signal.SIGKILL}")
    assert "will not go on after a reboot" in stopped.stdout
    assert to_go_on() == [f"job{signal.SIGTERM}"]


def test_not_wanted(workshop: Workshop) -> None:
    """--no-resume, and hosts that start a job again themselves."""
    launched = Launched(workshop, *fake("--total", "9"), options=("--no-resume",))
    launched.wait_for("step 1")
    assert to_go_on() == []
    assert launched.ends() == 0


def test_resume_one(workshop: Workshop) -> None:
    """With the options, the directory and the environment of the first start, from anywhere."""
    options = ("--grace", "77", "--fresh")
    launched = Launched(workshop, *fake("--total", "3000"), options=options)
    launched.wait_for("step 5")
    assert launched.signal(signal.SIGTERM).ends() == 75
    resumed = subprocess.run(
        [sys.executable, "-m", "ckptd", "resume", "--dir", str(workshop.path / "runs"), "job"],
        cwd="/",
        env=workshop.environment(OMP_NUM_THREADS="7"),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert logged(workshop) == list(range(1, 3001)), "not one step twice: --fresh was for once"
    assert to_go_on() == []


def test_all_of_them(workshop: Workshop) -> None:
    """Each under a supervisor of its own; a stop reaches all, and the code says what became."""
    names = ["one", "two"]
    for name in names:
        launched = Launched(workshop, *fake(), options=("--name", name))
        launched.wait_for("step 5")
        assert launched.signal(signal.SIGTERM).ends() == 75
    resuming = Resuming(workshop)
    for _ in names:
        resuming.wait_for("goes on, under process")
    wait_until(lambda: all(attached(workshop, name) == 2 for name in names))
    assert resuming.ends(signal.SIGTERM) == 75
    assert "".join(resuming.said).count("interrupted, and saved") == 2
    assert to_go_on() == names
    for name in names:
        steps = logged(workshop, name)
        assert steps == list(range(1, len(steps) + 1)), "not one step twice, not one left out"


def test_a_supervisor_that_is_killed_is_started_again(workshop: Workshop) -> None:
    launched = Launched(workshop, *fake("--total", "4000"))
    launched.wait_for("step 5")
    launched.signal(signal.SIGTERM).ends()
    resuming = Resuming(workshop)
    pid = int(resuming.wait_for("under process").split()[-1])
    wait_until(lambda: attached(workshop) == 2)
    os.kill(pid, signal.SIGKILL)
    resuming.wait_for("signal 9 (SIGKILL): again in")
    assert resuming.ends() == 0
    assert "job ended: finished" in "".join(resuming.said)
    # This worker does not save itself when its supervisor dies: it does some steps again.
    assert sorted(set(logged(workshop))) == list(range(1, 4001))


def test_nothing_to_do(workshop: Workshop) -> None:
    """No jobs; a directory that is not there is kept, and said."""
    assert Resuming(workshop).ends() == 0
    launched = Launched(workshop, *fake())
    launched.wait_for("step 5")
    launched.signal(signal.SIGTERM).ends()
    (workshop.path / "runs").rename(workshop.path / "elsewhere")
    resuming = Resuming(workshop)
    assert resuming.ends() == 0
    assert "is not there" in "".join(resuming.said)
    assert to_go_on() == ["job"]


def test_detached(workshop: Workshop) -> None:
    """In the background by itself: told when it runs, stopped as any other."""
    done = ckptd(workshop, *workshop.command("--detach")[3:], *fake())
    assert done.returncode == 0, done.stderr
    assert "is in the background" in done.stdout
    holder = run_of(workshop).supervisor()
    assert holder is not None
    assert os.getsid(holder.pid) != os.getsid(0), "a closed terminal does not reach it"
    wait_until(lambda: attached(workshop) == 1)
    assert ckptd(workshop, "stop", "--dir", "runs", "job").returncode == 0
    assert to_go_on() == []


def test_detached_and_refused(workshop: Workshop) -> None:
    """What keeps it from starting is told here, not in a file that nobody reads."""
    ckptd(workshop, *workshop.command("--no-resume")[3:], *fake("--total", "3"))
    done = ckptd(workshop, *workshop.command("--detach")[3:], *fake("--total", "4"))
    assert done.returncode == 64
    assert "another command" in done.stderr


def test_detached_under_the_service(workshop: Workshop) -> None:
    """It is the service's then, which stays when no job is left."""
    resuming = Resuming(workshop, "--stay")
    wait_until(lambda: Registry(os.environ).service() is not None)
    again = ckptd(workshop, "resume", "--all", "--stay")
    assert again.returncode == 69
    assert "keeps this user's jobs already" in again.stderr
    for name in ("one", "two"):
        words = workshop.command("--detach", "--name", name)[3:]
        done = ckptd(workshop, *words, *fake("--total", "50"))
        assert done.returncode == 0, done.stderr
        assert f"kept by process {resuming.process.pid}" in done.stdout
        resuming.wait_for(f"{name} ended: finished")
    assert resuming.ends(signal.SIGTERM) == 0
    assert to_go_on() == []


@pytest.mark.parametrize(
    ("name", "home"), [("ckptd@.service", "/home/ada"), ("ckptd.service", None)]
)
def test_units_are_those_that_are_installed(name: str, home: str | None) -> None:
    """What lies in systemd/ to be read is what `ckptd install-service` writes."""
    assert (UNITS / name).read_text() == install_service.unit(OF_ADA, home)
