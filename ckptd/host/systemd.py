"""A systemd service: it is told when the job runs, what it does, and that saving takes its time.

The protocol is one datagram a message to the socket that $NOTIFY_SOCKET names (sd_notify(3)).

Rules:

1. Starting again is systemd's: the unit's Restart= settings go by our exit code, and a unit that is
   enabled comes back after a reboot.
2. Saving must not be cut off at TimeoutStopSec: EXTEND_TIMEOUT_USEC has to come before that time is
   over, and then again and again, each before the last one is over.
3. Only the service's main process speaks for it. A socket that was inherited (a terminal of a
   JupyterHub, a shell in a service) is somebody else's: nothing is sent to it, and its unit does
   not start us again. `--host systemd` is for a unit whose main process is a shell around us.
4. The watchdog is for this process alone. A training that hangs is found in other ways.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ckptd.host.host import Plain

SOCKET_VARIABLE: Final = "NOTIFY_SOCKET"
#: What is ours alone: a script that finds these would speak for us.
OWN_VARIABLES: Final = (SOCKET_VARIABLE, "WATCHDOG_USEC", "WATCHDOG_PID", "SYSTEMD_EXEC_PID")
_GROUPS: Final = "/proc/{}/cgroup"
_ASK_BOUND_S: Final = 5.0
#: A flush that takes more than this of a time-out comes too close to it.
_SHARE: Final = 0.5
_MANAGER: Final = re.compile(r"/(user@\d+\.service)/")
_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|min|h|d|w|month|y)\b")
_SPAN_S: Final = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
    "month": 2629800.0,
    "y": 31557600.0,
}


class Systemd(Plain):
    """The service that this process is the main process of.

    Args:
        environment: with NOTIFY_SOCKET.
    """

    returns = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment[SOCKET_VARIABLE]
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._status = ""

    def doubts(self, flush_s: float | None) -> list[tuple[str, str]]:
        """See `Host`."""
        limits = stop_limits(os.getpid(), flush_s)
        return [(what, mend) for what, mend in limits if mend is not None]

    def described(self) -> str:
        """See `Host`."""
        unit = _unit(_groups("self"))
        return "a systemd service" if unit is None else f"systemd service {unit}"

    def ready(self) -> None:
        """See `Host`."""
        self._tell("READY=1")

    def status(self, text: Callable[[], str]) -> None:
        """See `Host`."""
        line = text()
        if line != self._status:
            self._status = line
            self._tell(f"STATUS={line}")

    def alive(self) -> None:
        """See `Host`."""
        self._tell("WATCHDOG=1")

    def more_time(self, seconds: float) -> None:
        """See `Host`."""
        self._tell(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def _tell(self, text: str) -> None:
        try:
            self._socket.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError:
            return  # systemd is restarting or swamped: the next message, in a second, says as much


def is_main(environment: Mapping[str, str]) -> bool:
    """Whether this process is the main process of a service."""
    pid = environment.get("SYSTEMD_EXEC_PID")
    if pid is not None:
        return pid == str(os.getpid())
    # Before version 248: a child of systemd's, in a service's control group.
    try:
        parent = Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").strip()
        groups = _groups("self")
    except OSError:
        return False
    return parent == "systemd" and _unit(groups) is not None


def user_units(environment: Mapping[str, str]) -> Path:
    """Where a user's own units lie."""
    home = environment.get("HOME") or str(Path.home())
    config = environment.get("XDG_CONFIG_HOME") or f"{home}/.config"
    return Path(config, "systemd", "user")


def stop_limits(pid: int, flush_s: float | None) -> list[tuple[str, str | None]]:
    """How long a process may take to save itself at a stop of its service, each with what mends it.

    Args:
        pid: the service's main process.
        flush_s: seconds that a checkpoint takes; None: that is not known.
    """
    try:
        groups = _groups(pid)
    except OSError:
        return []
    unit, manager = _unit(groups), _MANAGER.search(groups)
    if unit is None:
        return []
    found: list[tuple[str, str | None]] = []
    own = _show(unit, "TimeoutStopUSec", "KillMode", options=["--user"] if manager else [])
    if own.get("KillMode") not in (None, "mixed"):
        what = f"stop: KillMode={own['KillMode']} of {unit}: the job is signalled past ckptd"
        found.append((what, "KillMode=mixed in the unit"))
    if "TimeoutStopUSec" in own:
        text = f"stop: TimeoutStopSec={own['TimeoutStopUSec']} of {unit}, extended while it saves"
        found.append((text, None))
    if manager is None:
        return found
    # Nothing extends this one: it ends the user's manager, and all services with it.
    limit = _show(manager[1], "TimeoutStopUSec").get("TimeoutStopUSec")
    if limit is not None:
        short = flush_s is not None and flush_s > _SHARE * _span_s(limit)
        took = "" if flush_s is None else f", a checkpoint took {flush_s:.3g} s"
        mend = "as root: `ckptd install-service --system`, or TimeoutStopSec= by `systemctl edit "
        what = f"stop: at a shutdown {manager[1]} and what runs in it have {limit}{took}"
        found.append((what, f"{mend}user@.service`" if short else None))
    return found


def _show(unit: str, *names: str, options: Sequence[str] = ()) -> dict[str, str]:
    """Properties of a unit; none: nobody can tell."""
    asked = ("show", unit, *(f"--property={name}" for name in names))
    try:
        done = subprocess.run(
            ["systemctl", *options, *asked],  # noqa: S607  # the one on the PATH
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_BOUND_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = (line.partition("=") for line in done.stdout.splitlines())
    return {name: value for name, _, value in lines if value}


def _span_s(text: str) -> float:
    """A time as systemd prints it, "1min 30s" or "infinity"."""
    found = _SPAN.findall(text)
    return sum(float(number) * _SPAN_S[one] for number, one in found) if found else math.inf


def _groups(pid: int | str) -> str:
    return Path(_GROUPS.format(pid)).read_text(encoding="utf-8")


def lingers(user: str) -> bool:
    """Whether a user's own services start at boot, and not only when the user logs in."""
    return Path("/var/lib/systemd/linger", user).exists()


def _unit(groups: str) -> str | None:
    """The unit's name in /proc/self/cgroup: the last part of a path that is a service's."""
    for line in groups.splitlines():
        name = line.rpartition("/")[2]
        if name.endswith(".service"):
            return name
    return None
