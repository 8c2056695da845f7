"""Jobs that go on by themselves: in the background, after their supervisor is gone, all of them."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import filelock
import psutil
import pytest
from click.testing import CliRunner
from conftest import BOUND_S, Workshop, wait_until
from launched import Launched, fake, logged, python

from ckptd.cli import install_service
from ckptd.host import signals
from ckptd.host.host import Plain
from ckptd.supervisor import registry, service
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.run import Run, SupervisorFile, boot_id

UNITS = Path(__file__).parents[2] / "systemd"
USERS = ("ada", "bob")
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


PATCHED = """
import subprocess, threading
from ckptd.supervisor import registry, service
from ckptd.supervisor.run import Run
{}
from ckptd.cli.main import main
main()
"""


class Resuming:
    """`ckptd resume --all`, while it runs; `patch` is done to it before."""

    def __init__(self, workshop: Workshop, *options: str, patch: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PATCHED.format(patch), "resume", "--all", *options],
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
    interrupted(workshop, "changed")
    assert to_go_on() == ["changed"]
    launched = Launched(
        workshop, *fake("--total", str(2**40)), options=("--name", "changed", "--no-resume")
    )
    launched.wait_for("step ")
    assert to_go_on() == []
    assert launched.signal(signal.SIGTERM).ends() == 75


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


def interrupted(workshop: Workshop, *names: str, total: int = 2**40) -> None:
    """Runs that are to go on, and do not run now."""
    for name in names:
        launched = Launched(workshop, *fake("--total", str(total)), options=("--name", name))
        launched.wait_for("step 3")
        assert launched.signal(signal.SIGTERM).ends() == 75


def test_one_jobs_damage_is_its_own(workshop: Workshop) -> None:
    """It is said; the others go on, and a service that stays stays."""
    names = [f"{file}-{n}" for file in ("job", "supervisor", "launch") for n in (1,)]
    interrupted(workshop, *names, "sound", total=400)
    for name in names:
        (run_of(workshop, name).path / f"{name.split('-')[0]}.json").write_text('{"cut')
    resuming = Resuming(workshop, "--stay")
    resuming.wait_for("sound ended: finished")
    assert resuming.process.poll() is None
    assert resuming.ends(signal.SIGTERM) == 0
    said = "".join(resuming.said)
    for name in names:
        assert f"{name} can't be started: {run_of(workshop, name).path}" in said
    assert to_go_on() == sorted(names)


def test_stopped_while_the_service_pauses(workshop: Workshop) -> None:
    """Its supervisor was killed and is to be started again in a moment: its owner's word counts."""
    interrupted(workshop, "job")
    resuming = Resuming(workshop, "--stay")
    for pause_s in (1, 2, 4):
        pid = int(resuming.wait_for("under process").split()[-1])
        wait_until(lambda: run_of(workshop).supervisor() is not None)
        os.kill(pid, signal.SIGKILL)
        resuming.wait_for(f"again in {pause_s} s")
    assert ckptd(workshop, "stop", "--dir", "runs", "job").returncode == 0
    resuming.wait_for("job was stopped by its owner")
    assert to_go_on() == []
    assert resuming.ends(signal.SIGTERM) == 0


def test_stopped_while_it_starts(workshop: Workshop) -> None:
    """Between the service's start of a supervisor and that supervisor's first sign of life: one of
    the two sees the other, under the run's lock."""
    interrupted(workshop, "job")
    run, before = run_of(workshop), attached(workshop)
    Registry(os.environ).remove(run)
    process = registry.start(run, if_wanted=True)
    assert process.wait(BOUND_S) == 64, "it comes late: refused"
    assert to_go_on() == []
    descriptor = os.open(run.path / "lock", os.O_RDWR)
    assert filelock.lock_descriptor(descriptor, blocking=False)
    Registry(os.environ).add(run)
    stop = subprocess.Popen(
        [sys.executable, "-m", "ckptd", "stop", "--dir", "runs", "job"],
        cwd=workshop.path,
        env=workshop.environment(),
    )
    wait_until(lambda: to_go_on() == [])
    assert stop.poll() is None, "who has the lock may say in a moment that it runs"
    os.close(descriptor)
    assert stop.wait(BOUND_S) == 0
    assert attached(workshop) == before


def test_a_disk_that_comes_late(workshop: Workshop) -> None:
    """A run's directory that was not there at boot is looked for again."""
    interrupted(workshop, "job", total=400)
    (workshop.path / "runs").rename(workshop.path / "elsewhere")
    resuming = Resuming(workshop, "--stay", patch="service._LOOK_AGAIN_S = 0.2")
    resuming.wait_for("is not there")
    (workshop.path / "elsewhere").rename(workshop.path / "runs")
    resuming.wait_for("job ended: finished")
    assert resuming.ends(signal.SIGTERM) == 0
    assert "".join(resuming.said).count("is not there") == 1


def test_a_disk_that_does_not_answer(workshop: Workshop) -> None:
    """It holds nobody up: neither the other jobs nor the service, nor its end."""
    interrupted(workshop, "hangs", "sound", total=3000)
    patch = """
service._LOOK_BOUND_S = 1.0
job = Run.job
Run.job = lambda run: threading.Event().wait() if run.path.name == "hangs" else job(run)
"""
    resuming = Resuming(workshop, "--stay", patch=patch)
    said = [resuming.wait_for(" does not answer"), resuming.wait_for("ended: finished")]
    assert ["hangs" in said[0], "sound" in said[1]] == [True, True]
    assert resuming.ends(signal.SIGTERM) == 0


def test_what_runs_elsewhere(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a home that machines share, each has its own jobs and its own service; and a run whose
    supervisor is on another machine is not started, since nobody can tell whether it lives."""
    interrupted(workshop, "job")
    run, here = run_of(workshop), Registry(os.environ)
    identity = workshop.path / "machine-id"
    with monkeypatch.context() as other:
        other.setattr(registry, "_MACHINE_ID", identity)
        assert Registry(os.environ).path.parent.name == os.uname().nodename
        identity.write_text("uninitialized\n")
        assert Registry(os.environ).path.parent.name == os.uname().nodename
        identity.write_text("0123456789abcdef0123456789abcdef\n")
        there = Registry(os.environ)
        assert there.runs() == []
        there.serve()
        assert there.service() is not None
    assert here.service() is None
    run.write(SupervisorFile(1, 1.0, "node7", "boot", "socket"))
    resuming = Resuming(workshop)
    assert resuming.ends() == 0
    assert "job runs elsewhere, on node7" in "".join(resuming.said)
    assert attached(workshop) == 1


def test_asked_while_it_stops(workshop: Workshop) -> None:
    """Nobody would stop what was started then."""
    launched = Launched(workshop, *fake("--stay"), options=("--grace", "3"))
    launched.wait_for("step 3")
    launched.signal(signal.SIGTERM).ends()
    interrupted(workshop, "late")
    Registry(os.environ).remove(run_of(workshop, "late"))
    resuming = Resuming(workshop, "--stay")
    wait_until(lambda: attached(workshop) == 2)
    Registry(os.environ).add(run_of(workshop, "late"))
    assert resuming.ends(signal.SIGTERM, signal.SIGUSR2) == 75
    assert attached(workshop, "late") == 1
    assert "late goes on" not in "".join(resuming.said)


class Asked(Plain):
    """A host that counts how often it is asked for more time."""

    times = 0

    def more_time(self, seconds: float) -> None:
        self.times += 1


@pytest.fixture
def own_signals() -> Iterator[None]:
    """The tests' own handlers are there again afterwards."""
    before = {number: signal.getsignal(number) for number in signals._WATCHED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_is_not_drawn_out_for_ever(own_signals: None) -> None:
    """After an hour the host's own limit holds, should a job not answer any more."""
    host = Asked()
    keeper = service.Service(Registry(os.environ), host, print, stay=True)
    keeper._tell_host()
    assert host.times == 0
    keeper._stop()
    keeper._tell_host()
    assert host.times == 1
    assert keeper._stop_began_s is not None
    keeper._stop_began_s -= service._STOP_S_MAX
    keeper._tell_host()
    assert host.times == 1
    keeper._signals.close()


def test_ctrl_c_while_it_waits_for_the_lock(workshop: Workshop) -> None:
    """Nobody at a terminal has to sit through the grace of a worker that was left behind."""
    interrupted(workshop, "job")
    run = run_of(workshop)
    run.write(SupervisorFile(2**22 + 1, 1.0, os.uname().nodename, boot_id(), "socket"))
    descriptor = os.open(run.path / "lock", os.O_RDWR)
    assert filelock.lock_descriptor(descriptor, blocking=False)
    launched = Launched(workshop, *fake("--total", str(2**40)), options=("--grace", "600"))
    launched.wait_for("has up to 600 s to save itself")
    assert launched.signal(signal.SIGINT).ends() == 130
    launched = Launched(workshop, *fake("--total", str(2**40)), options=("--grace", "600"))
    launched.wait_for("has up to 600 s to save itself")
    launched.signal(signal.SIGTERM)
    os.close(descriptor)
    assert launched.ends() == 75, "heard, and acted on as soon as the lock is there"
    assert attached(workshop) == 1


def test_what_failed_itself_is_tried_again(workshop: Workshop) -> None:
    """After a pause that grows, so many times; then it is said how it can go on."""
    interrupted(workshop, "job")
    patch = """
service._DEATHS_MAX, service._PAUSE_S_MAX = 3, 0.1
registry.start = lambda run, **_: subprocess.Popen(["sh", "-c", "exit 1"])
"""
    resuming = Resuming(workshop, patch=patch)
    assert resuming.ends() == 74
    said = "".join(resuming.said)
    assert said.count("the supervisor of job ended by exit status 1: again in") == 3
    assert "for the 4th time in a row" in said
    assert f"ckptd resume --dir {workshop.path}/runs job" in said
    assert to_go_on() == ["job"]


def test_what_became_of_earlier_jobs(workshop: Workshop) -> None:
    """A job that was given up on does not make the service's own end, later, a failure."""
    resuming = Resuming(workshop, "--stay")
    wait_until(lambda: Registry(os.environ).service() is not None)
    words = workshop.command("--detach", "--max-restarts", "0")[3:]
    ckptd(workshop, *words, *python("import time; time.sleep(1); exit(3)"))
    resuming.wait_for("job ended: given up on")
    assert resuming.ends(signal.SIGTERM) == 0


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


@pytest.mark.parametrize("where", ["--no-resume", "in a Slurm job"])
def test_detached_and_not_to_go_on(workshop: Workshop, where: str) -> None:
    """A process of its own then, also where the service runs: that one keeps what goes on."""
    options = ("--no-resume",) if where == "--no-resume" else ("--host", "slurm")
    more = {} if where == "--no-resume" else {"SLURM_JOB_ID": "7"}
    resuming = Resuming(workshop, "--stay")
    wait_until(lambda: Registry(os.environ).service() is not None)
    words = workshop.command("--detach", *options)[3:]
    done = ckptd(workshop, *words, *fake(), **more)
    assert done.returncode == 0, done.stderr
    assert "kept by" not in done.stdout
    assert to_go_on() == []
    assert ckptd(workshop, "stop", "--dir", "runs", "job").returncode == 0
    assert resuming.ends(signal.SIGTERM) == 0


@pytest.mark.parametrize(("source", "code"), [("", 0), ("exit(3)", 70)])
def test_detached_and_soon_over(workshop: Workshop, source: str, code: int) -> None:
    """A job that ends before anybody looks is not waited for; its end is told."""
    resuming = Resuming(workshop, "--stay")
    wait_until(lambda: Registry(os.environ).service() is not None)
    patched = "from ckptd.supervisor.run import Run; Run.supervisor = lambda run: None"
    words = [*workshop.command("--detach", "--max-restarts", "0")[3:], *python(source)]
    done = subprocess.run(
        [sys.executable, "-c", f"{patched}\nfrom ckptd.cli.main import main; main()", *words],
        cwd=workshop.path,
        env=workshop.environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "has ended already" in done.stderr
    resuming.wait_for("job ended: ")  # by the time that it is stopped
    assert resuming.ends(signal.SIGTERM) == 0


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
    ("name", "whose"), [("ckptd@ada.service", ("ada", "/home/ada")), ("ckptd.service", ())]
)
def test_units_are_those_that_are_installed(name: str, whose: tuple[str, ...]) -> None:
    """What lies in systemd/ to be read is what `ckptd install-service` writes."""
    assert (UNITS / name).read_text() == install_service.unit(OF_ADA, *whose)


def test_two_users_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing for one leaves the other's unit as it was; one that runs and has changed is
    started again, so that it is what was written."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(install_service, "_SYSTEM_UNITS", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    homes = {name: pwd.struct_passwd((name, "", 1, 1, "", f"/home/{name}", "")) for name in USERS}
    monkeypatch.setattr(pwd, "getpwnam", homes.__getitem__)

    def install(user: str, program: str) -> tuple[str, list[str]]:
        (tmp_path / "calls").write_text("")
        monkeypatch.setattr(install_service, "_program", lambda: program)
        words = ["--system", "--for", user]
        done = CliRunner().invoke(install_service.command, words, catch_exceptions=False)
        return done.output, (tmp_path / "calls").read_text().splitlines()

    install("ada", "/opt/ada/ckptd")
    first = (tmp_path / "ckptd@ada.service").read_text()
    assert "User=ada\n" in first
    install("bob", "/opt/bob/ckptd")
    assert (tmp_path / "ckptd@ada.service").read_text() == first
    assert "/home/bob" in (tmp_path / "ckptd@bob.service").read_text()
    _, calls = install("ada", "/opt/ada/ckptd")
    assert "restart ckptd@ada.service" not in calls, "nothing has changed"
    said, calls = install("ada", "/opt/newer/ckptd")
    assert calls[-1] == "restart ckptd@ada.service"
    assert "is started again" in said
