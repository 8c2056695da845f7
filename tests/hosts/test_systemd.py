"""Under systemd's notification protocol, spoken with a socket of the test's own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Workshop
from launched import Launched, fake

from ckptd.errors import UsageError
from ckptd.host import host, systemd
from ckptd.host.host import Plain
from ckptd.supervisor.registry import Registry

BOUND_S = 120.0
#: The tests start it, and not systemd.
AS_A_SERVICE = ("--host", "systemd")


class Manager:
    """What systemd is to a service: a socket that takes its datagrams."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(BOUND_S)
        self.told: list[str] = []

    def hear_at_once(self) -> str:
        """A message that is there already."""
        self._socket.settimeout(0)
        return self._socket.recv(4096).decode()

    def wait_for(self, text: str) -> str:
        """The next message that begins like this."""
        while True:
            self.told.append(self._socket.recv(4096).decode())
            if self.told[-1].startswith(text):
                return self.told[-1]


def test_a_service_is_heard(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY when the job runs, then its step and the watchdog's ping; at a stop, more time for as
    long as saving takes. The script finds nothing of it in its environment."""
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    # It stays when it has its receipt, so that the stop lasts until its grace is over.
    launched = Launched(workshop, *fake("--stay"), options=("--grace", "3", *AS_A_SERVICE))
    launched.wait_for("step 3")
    assert manager.wait_for("READY=1")
    assert manager.told == ["READY=1"], "nothing is said before it runs"
    manager.wait_for("WATCHDOG=1")
    assert "step" in manager.wait_for("STATUS=")
    (worker,) = launched.descendants()
    assert not [name for name in worker.environ() if name in systemd.OWN_VARIABLES]
    assert not [one for one in manager.told if one.startswith("EXTEND")], "only a stop takes time"
    launched.signal(signal.SIGTERM)
    assert manager.wait_for("EXTEND_TIMEOUT_USEC=") == "EXTEND_TIMEOUT_USEC=30000000"
    assert launched.ends() == 75, launched.told()


def test_a_manager_that_is_gone_stops_nobody(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd may restart itself: nobody listens for a while."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    launched = Launched(workshop, *fake("--total", "10"), options=AS_A_SERVICE)
    assert launched.ends() == 0, launched.told()


def test_the_host_is_recognised() -> None:
    """By what it leaves in the environment; one that is named and not there is an error."""
    here = {"NOTIFY_SOCKET": "@/org/systemd", "SYSTEMD_EXEC_PID": str(os.getpid())}
    assert isinstance(host.recognised(here), systemd.Systemd)
    assert isinstance(host.recognised(here, "none"), Plain)
    assert isinstance(host.recognised({}), Plain)
    with pytest.raises(UsageError, match="NOTIFY_SOCKET is not set"):
        host.recognised({}, "systemd")


def test_a_socket_of_somebody_else(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal within a service inherits its variables: nothing is sent there, and since nobody
    starts the job again, it is one that goes on after a reboot."""
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for pid in (str(os.getpid()), None):
        if pid is None:
            monkeypatch.delenv("SYSTEMD_EXEC_PID")
        else:
            monkeypatch.setenv("SYSTEMD_EXEC_PID", pid)
        launched = Launched(workshop, *fake("--total", "600"))
        launched.wait_for("step 3")
        assert [run.path.name for run in Registry(os.environ).runs()] == ["job"]
        assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
        assert "service" not in launched.told()
    with pytest.raises(BlockingIOError):
        manager.hear_at_once()


def test_before_version_248(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its variable: a child of systemd's, in a service."""
    here = {"NOTIFY_SOCKET": "@/org/systemd"}
    groups = tmp_path / "cgroup"
    groups.write_text("0::/system.slice/train.service\n")
    monkeypatch.setattr(systemd, "_GROUPS", str(groups))
    assert isinstance(host.recognised(here), Plain), "a child of the tests"
    systemd_like = tmp_path / "systemd"
    systemd_like.symlink_to("/bin/sh")
    source = (
        "from ckptd.host import host, systemd\n"
        f"systemd._GROUPS = {str(groups)!r}\n"
        f"print(type(host.recognised({here!r})).__name__)"
    )
    said = subprocess.run(
        [str(systemd_like), "-c", '"$@"; exit', "sh", sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "Systemd"


def test_how_long_a_stop_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit's own limit is extended while it saves; that of a user's manager is not."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        "#!/bin/sh\ncase $* in *user@*) echo TimeoutStopUSec=2min ;;\n"
        "*) echo TimeoutStopUSec=1min 30s; echo KillMode=$KILL_MODE ;; esac\n"
    )
    systemctl.chmod(0o755)
    groups = tmp_path / "cgroup"
    monkeypatch.setattr(systemd, "_GROUPS", str(groups))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("KILL_MODE", "mixed")
    groups.write_text("0::/system.slice/train.service\n")
    ((what, mend),) = systemd.stop_limits(1, 100.0)
    assert ("TimeoutStopSec=1min 30s of train.service" in what, mend) == (True, None)
    groups.write_text("0::/user.slice/user-7.slice/user@7.service/app.slice/ckptd.service\n")
    assert [mend for _, mend in systemd.stop_limits(1, 10.0)] == [None, None]
    _, (what, mend) = systemd.stop_limits(1, 100.0)
    assert "user@7.service and what runs in it have 2min, a checkpoint took 100 s" in what
    assert mend is not None
    monkeypatch.setenv("KILL_MODE", "control-group")
    assert systemd.stop_limits(1, None)[0][1] == "KillMode=mixed in the unit"
    systemctl.write_text("#!/bin/sh\nexit 1\n")
    assert systemd.stop_limits(1, 100.0) == []
    assert systemd._span_s("infinity") > 1e9


def test_the_unit_is_named() -> None:
    """As the control group's path says, in both versions of control groups."""
    assert systemd._unit("0::/system.slice/system-ckptd.slice/ckptd@a.service\n") == (
        "ckptd@a.service"
    )
    assert systemd._unit("9:name=systemd:/user.slice\n0::/init.scope\n") is None
