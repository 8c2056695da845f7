"""Under a real systemd: a job comes back after a reboot and a power cut, and ends bitwise right.

The unit is the one that `ckptd install-service` writes, installed by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import machine
import pytest
from conftest import SCRIPTS, Workshop, wait_until
from machine import Machine

from ckptd.supervisor import journal

SCRIPT = str(SCRIPTS / "steady.py")
CKPTD = str(Path(sys.executable).with_name("ckptd"))
DROP_IN = "/etc/systemd/system/ckptd@.service.d/test.conf"
pytestmark = [
    pytest.mark.real,
    pytest.mark.nightly,
    pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing())),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the machine's user, seen here as well."""
    path = tmp_path_factory.mktemp("home")
    for one in (path, path.parent):
        one.chmod(0o777)
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the plain script gives."""
    workshop = Workshop(tmp_path_factory.mktemp("plain"))
    workshop.plain(sys.executable, SCRIPT, str(workshop.path / "result"), "0")
    return (workshop.path / "result").read_text()


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Machine]:
    """The machine, up, with the service of its user ada."""
    one = Machine(tmp_path_factory.mktemp("machine"), [home])
    one.on()
    said = one.run(f"{CKPTD} install-service --system --for ada")
    assert "ckptd@ada.service is enabled and runs" in said, said
    yield one
    one.cut()


def detach(
    booted: Machine, home: Path, name: str, pace_s: float, *options: str, user: str = "ada"
) -> None:
    """Start a job in the background, under the service."""
    said = booted.run(
        f"cd {home} && OMP_NUM_THREADS=1 {CKPTD} launch --detach --name {name} "
        f"{' '.join(options)} -- {sys.executable} {SCRIPT} {home / name}.result {pace_s}",
        user=user,
    )
    assert "kept by process" in said, said


def detach_and_save(
    booted: Machine, home: Path, name: str, pace_s: float, user: str = "ada"
) -> None:
    """The same; it has a checkpoint when this returns."""
    detach(booted, home, name, pace_s, "--every", "0.5", user=user)
    wait_until(lambda: "durable" in events(home, name))


def events(home: Path, name: str) -> list[str]:
    return [e["event"] for e in journal.read(home / "ckptd-runs" / name / "journal.jsonl")]


@pytest.mark.parametrize("how", ["reboot", "power cut"])
def test_it_goes_on(booted: Machine, home: Path, expected: str, how: str) -> None:
    """By itself, from where it was; with the environment that it was started with."""
    name = how.replace(" ", "-")
    detach_and_save(booted, home, name, 0.05)
    if how == "reboot":
        booted.reboot()
    else:
        booted.cut()
        booted.on()
    wait_until(lambda: "finished" in events(home, name))
    assert events(home, name).count("started") == 2
    assert ("stopped" in events(home, name)) == (how == "reboot")
    assert (home / f"{name}.result").read_text() == expected
    assert booted.run("systemctl is-active ckptd@ada").strip() == "active"


def test_what_its_owner_stopped_stays_so(booted: Machine, home: Path) -> None:
    detach_and_save(booted, home, "stopped", 0.05)
    assert "durable" in booted.run(f"cd {home} && {CKPTD} stop stopped 2>&1", user="ada")
    before = events(home, "stopped")
    booted.reboot()
    wait_until(lambda: "no jobs" in booted.run("systemctl status ckptd@ada"))
    assert events(home, "stopped") == before


def test_a_stop_longer_than_its_time_out(booted: Machine, home: Path, expected: str) -> None:
    """A step of eight seconds, TimeoutStopSec of three: more time is asked for, and it is saved."""
    name = "slow"
    booted.run(
        f"mkdir -p {Path(DROP_IN).parent}; "
        f"printf '[Service]\\nTimeoutStopSec=3\\n' > {DROP_IN}; systemctl daemon-reload"
    )
    detach(booted, home, name, 8)
    wait_until(lambda: "attached" in events(home, name))
    booted.run("systemctl stop ckptd@ada")
    assert events(home, name)[-1] == "stopped", "it was killed before it was saved"
    assert "durable" in events(home, name)
    assert booted.run("systemctl show -p Result ckptd@ada").strip() == "Result=success"
    booted.run(f"rm {DROP_IN}; systemctl daemon-reload; systemctl start ckptd@ada")
    wait_until(lambda: events(home, name).count("attached") == 2)
    booted.run(f"cd {home} && {CKPTD} stop {name}", user="ada")


def test_the_watchdog(booted: Machine, home: Path, expected: str) -> None:
    """A supervisor of supervisors that is stuck is ended and started again; its jobs go on."""
    booted.run(
        f"mkdir -p {Path(DROP_IN).parent}; "
        f"printf '[Service]\\nWatchdogSec=3\\n' > {DROP_IN}; "
        "systemctl daemon-reload; systemctl restart ckptd@ada"
    )
    detach_and_save(booted, home, "watched", 0.1)
    booted.run("kill -STOP $(systemctl show -p MainPID --value ckptd@ada)")
    wait_until(lambda: events(home, "watched").count("attached") == 2)
    assert booted.run("systemctl show -p NRestarts --value ckptd@ada").strip() == "1"
    wait_until(lambda: "finished" in events(home, "watched"))
    assert (home / "watched.result").read_text() == expected
    booted.run(f"rm {DROP_IN}; systemctl daemon-reload")


def test_a_users_own_unit(booted: Machine, home: Path, expected: str) -> None:
    """Installed without root by a user who may linger: it saves at a reboot, and goes on after."""
    own = home / "bob"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    booted.run("useradd -m bob; loginctl enable-linger bob")

    def as_bob(command: str) -> str:
        return booted.run(f"export XDG_RUNTIME_DIR=/run/user/$(id -u); {command}", user="bob")

    wait_until(lambda: as_bob("systemctl --user is-system-running").strip() == "running")
    said = as_bob(f"{CKPTD} install-service --user")
    assert "ckptd.service is enabled and runs" in said, said
    assert "linger" not in said.partition("is enabled and runs")[2], "bob may linger"
    detach_and_save(booted, own, "own", 0.05, user="bob")
    booted.reboot()
    wait_until(lambda: "finished" in events(own, "own"))
    assert [e for e in events(own, "own") if e in ("started", "stopped")] == [
        *("started", "stopped", "started")
    ]
    assert (own / "own.result").read_text() == expected
    assert as_bob("systemctl --user is-active ckptd").strip() == "active"
