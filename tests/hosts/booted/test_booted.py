"""Under a real systemd: a job comes back after a reboot and a power cut, and ends bitwise right.

The unit is the one that `ckptd install-service` writes, installed by it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import drive
import machine
import pytest
from conftest import SCRIPTS, Workshop, wait_until
from drive import Drive
from machine import Machine, MachineError

from ckptd.supervisor import journal

SCRIPT = str(SCRIPTS / "steady.py")
CKPTD = str(Path(sys.executable).with_name("ckptd"))
DROP_IN = "/etc/systemd/system/ckptd@.service.d/test.conf"
TIMEOUT_STOP_S = 3
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(900),  # the first one makes and boots the machine
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
def slow(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drive | None]:
    """A disk of the machine's that can stop answering; None: not asked for, or not to be had."""
    asked = any("slow" in item.name for item in request.session.items)
    if not asked or drive.missing("ext4") is not None:
        yield None
        return
    path = tmp_path_factory.mktemp("drive")
    path.chmod(0o755)
    one = Drive(path, "ext4")
    one.files.chmod(0o777)
    yield one
    one.off()


@pytest.fixture(scope="module")
def booted(
    tmp_path_factory: pytest.TempPathFactory, home: Path, slow: Drive | None
) -> Iterator[Machine]:
    """The machine, up, with the service of its user ada."""
    one = None
    try:
        one = Machine(
            tmp_path_factory.mktemp("machine"), [home] if slow is None else [home, slow.files]
        )
        one.on()
    except MachineError as error:
        if one is not None:
            one.cut()
        pytest.skip(str(error))
    try:
        said = one.run(f"{CKPTD} install-service --system --for ada")
        assert "ckptd@ada.service is enabled and runs" in said, said
        yield one
    finally:
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


def test_it_goes_on(booted: Machine, home: Path, expected: str) -> None:
    """After a reboot and after a power cut, by itself, from where it was; with the environment that
    it was started with."""
    detach_and_save(booted, home, "steady", 0.1)
    booted.reboot()
    wait_until(lambda: "durable" in events(home, "steady")[from_start(home, "steady", 2) :])
    booted.cut()
    booted.on()
    wait_until(lambda: "finished" in events(home, "steady"))
    seen = [e for e in events(home, "steady") if e in ("started", "stopped", "finished")]
    assert seen == ["started", "stopped", "started", "started", "finished"]
    assert (home / "steady.result").read_text() == expected
    assert booted.run("systemctl is-active ckptd@ada").strip() == "active"


def from_start(home: Path, name: str, number: int) -> int:
    """Where the events of the n-th start begin; behind all, if there is none yet."""
    starts = [n for n, event in enumerate(events(home, name)) if event == "started"]
    return starts[number - 1] if len(starts) >= number else 10**9


@pytest.mark.nightly
def test_what_its_owner_stopped_stays_so(booted: Machine, home: Path) -> None:
    detach_and_save(booted, home, "stopped", 0.05)
    assert "durable" in booted.run(f"cd {home} && {CKPTD} stop stopped 2>&1", user="ada")
    before = events(home, "stopped")
    booted.reboot()
    wait_until(lambda: "no jobs" in booted.run("systemctl status ckptd@ada"))
    assert events(home, "stopped") == before


@pytest.mark.nightly
def test_a_slow_flush(booted: Machine, slow: Drive | None) -> None:
    """The disk takes the checkpoint only after several times TimeoutStopSec: more time is asked
    for, and the job is saved."""
    if slow is None:
        pytest.skip(str(drive.missing("ext4")))
    home, name = slow.files, "slow"
    booted.run(
        f"mkdir -p {Path(DROP_IN).parent}; printf '[Service]\\nTimeoutStopSec={TIMEOUT_STOP_S}\\n' "
        f"> {DROP_IN}; systemctl daemon-reload"
    )
    detach(booted, home, name, 1)
    wait_until(lambda: "attached" in events(home, name))
    slow.hang()
    answers = threading.Timer(4 * TIMEOUT_STOP_S, slow.mend)
    answers.start()
    began_s = time.monotonic()
    booted.run("systemctl stop ckptd@ada")
    took_s = time.monotonic() - began_s
    answers.join()
    assert events(home, name)[-1] == "stopped", "it was killed before it was saved"
    assert took_s > 2 * TIMEOUT_STOP_S, "the disk was not slow"
    assert "durable" in events(home, name)
    assert booted.run("systemctl show -p Result ckptd@ada").strip() == "Result=success"
    booted.run(f"rm {DROP_IN}; systemctl daemon-reload; systemctl start ckptd@ada")
    wait_until(lambda: events(home, name).count("attached") == 2)
    booted.run(f"cd {home} && {CKPTD} stop {name}", user="ada")


@pytest.mark.nightly
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


@pytest.mark.nightly
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
