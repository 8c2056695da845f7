"""`ckptd install-service`: the service that goes on with a user's jobs after a reboot."""

from __future__ import annotations

import getpass
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Final

import click

from ckptd.errors import CkptdError, UsageError
from ckptd.host import systemd

_SYSTEM_UNITS: Final = Path("/etc/systemd/system")

_UNIT: Final = """\
# After a reboot this goes on with every ckptd job of {whose} that has not finished and was
# not stopped by its owner, each under a supervisor of its own; `ckptd launch --detach` adds more.
# `ckptd install-service {option}` writes and enables it.

[Unit]
Description=ckptd: training jobs of {of}
{after}
[Service]
Type=notify
{user}ExecStart={ckptd} resume --all --stay
# New jobs are looked for at this signal.
ExecReload=/bin/kill -USR2 $MAINPID

# A stop is SIGTERM to ckptd alone: it has every job save itself. While they do, it asks for more
# time, so that this is only the limit for one that does not answer any more. What is left then is
# killed.
KillMode=mixed
TimeoutStopSec=90
# For ckptd itself, which reports every second. A training that hangs is found by ckptd.
WatchdogSec=60

# 75: interrupted, and to be started again. 0: ended. 64: bad usage. 69: it runs already.
# 70: given up on.
SuccessExitStatus=75
RestartForceExitStatus=75
RestartPreventExitStatus=0 64 69 70
Restart=on-failure
RestartSec=5
# One killed process of a job is ckptd's to handle, and no reason to stop all of them.
OOMPolicy=continue

[Install]
WantedBy={target}
"""
_AFTER: Final = """\
# Its jobs need their disks, and often the network.
After=network-online.target remote-fs.target
Wants=network-online.target
RequiresMountsFor={home}
"""


def unit(ckptd: str, user: str | None = None, home: str = "") -> str:
    """The unit's text.

    Args:
        ckptd: the path of the program.
        user: for a unit of the system's, of which each user has one: whose. None: for a unit of the
            user's own.
        home: for a unit of the system's: the user's home, which has to be mounted.
    """
    if user is None:
        return _UNIT.format(
            whose="its user", option="--user", of="%u", after="", user="", ckptd=ckptd,
            target="default.target",
        )  # fmt: skip
    return _UNIT.format(
        whose=f"the user {user}", option="--system", of=user, after=_AFTER.format(home=home),
        user=f"User={user}\n", ckptd=ckptd, target="multi-user.target",
    )  # fmt: skip


@click.command("install-service")
@click.option("--user", "place", flag_value="user", help="For this user alone, without root.")
@click.option("--system", "place", flag_value="system", help="For the machine, by root.")
@click.option(
    "--for", "whose", metavar="USER", help="With --system: whose jobs.  [default: $SUDO_USER]"
)
@click.option("--print", "only_print", is_flag=True, help="Only show the unit.")
def command(place: str | None, whose: str | None, *, only_print: bool) -> int:
    """Write, show and enable the systemd unit that goes on with a user's jobs after a reboot.

    --system makes ckptd@USER.service, which starts at boot; each user has a file of their own, with
    their home and the ckptd that installed it. --user makes ckptd.service of this
    user's own systemd, which starts at boot only for users who may linger (`loginctl
    enable-linger`). Without either: --system for root, else --user.
    """
    place = place or ("system" if os.geteuid() == 0 else "user")
    if place == "system":
        _install_system(whose or os.environ.get("SUDO_USER") or getpass.getuser(), only_print)
    elif whose is not None:
        raise UsageError("--for is for --system: a user's own unit is installed by that user")
    else:
        _install_user(only_print)
    return 0


def _install_system(user: str, only_print: bool) -> None:  # noqa: FBT001  # click's own flag
    try:
        home = pwd.getpwnam(user).pw_dir
    except KeyError:
        raise UsageError(f"there is no user called {user!r} on this machine") from None
    path = _SYSTEM_UNITS / f"ckptd@{user}.service"
    _show(path, text := unit(_program(), user, home))
    if only_print:
        return
    if os.geteuid() != 0:
        raise UsageError(
            f"only root may write {path}: `sudo {_program()} install-service --system "
            f"--for {user}`, or without root `ckptd install-service --user`"
        )
    _put(path, text)
    click.echo(f"ckptd@{user}.service is enabled and runs: `systemctl status ckptd@{user}`")


def _install_user(only_print: bool) -> None:  # noqa: FBT001  # the same
    path = systemd.user_units(os.environ) / "ckptd.service"
    _show(path, text := unit(_program(), None))
    if only_print:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, text, "--user")
    click.echo(f"{path.name} is enabled and runs: `systemctl --user status ckptd`")
    if not systemd.lingers(getpass.getuser()):
        click.echo(
            "it starts when you log in, and not at boot, until you may linger: "
            f"`loginctl enable-linger {getpass.getuser()}`"
        )


def _put(path: Path, text: str, *options: str) -> None:
    """Write, enable and start a unit; one that runs and has changed is started again."""
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text(text, encoding="utf-8")
    _systemctl(*options, "daemon-reload")
    ran = _ask_systemctl(*options, "is-active", "--quiet", path.name).returncode == 0
    _systemctl(*options, "enable", "--now", path.name)
    if ran and before != text:
        click.echo(f"{path.name} has changed and is started again: its jobs save themselves first")
        _systemctl(*options, "restart", path.name)


def _program() -> str:
    """This ckptd's path, for a service that knows no PATH of ours."""
    beside = Path(sys.executable).with_name("ckptd")
    return str(beside) if beside.exists() else f"{sys.executable} -m ckptd"


def _show(path: Path, text: str) -> None:
    click.echo(f"# {path}\n{text}")


def _systemctl(*words: str) -> None:
    done = _ask_systemctl(*words)
    if done.returncode != 0:
        raise CkptdError(f"systemctl {' '.join(words)}: {done.stderr.strip()}")


def _ask_systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["systemctl", *words],  # noqa: S607  # the one that a user finds
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise UsageError(
            "there is no systemctl here. Without systemd, `ckptd launch --detach` starts jobs in "
            "the background, and `ckptd resume --all` at boot (cron: @reboot) goes on with them"
        ) from None
