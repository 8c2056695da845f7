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

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from ckptd.host.host import Plain

SOCKET_VARIABLE: Final = "NOTIFY_SOCKET"
#: What is ours alone: a script that finds these would speak for us.
OWN_VARIABLES: Final = (SOCKET_VARIABLE, "WATCHDOG_USEC", "WATCHDOG_PID", "SYSTEMD_EXEC_PID")
_GROUPS: Final = Path("/proc/self/cgroup")


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

    def described(self) -> str:
        """See `Host`."""
        unit = _unit(_GROUPS.read_text(encoding="utf-8"))
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
        groups = _GROUPS.read_text(encoding="utf-8")
    except OSError:
        return False
    return parent == "systemd" and _unit(groups) is not None


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
