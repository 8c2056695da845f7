"""A booted machine: a Debian with systemd as its first process, in a container of its own.

It shares this machine's kernel and network; what it runs, its users and its services are its own.
Python and this checkout are seen in it at their own paths. A power cut kills everything in it at
once; what it had written stays: what a disk loses at a cut is tested in tests/disks.

Needs root and Debian's systemd-container and mmdebstrap.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import psutil

REPOSITORY: Final = Path(__file__).parents[3]
_PACKAGES: Final = (
    *("systemd-sysv", "dbus", "libpam-systemd", "python3-minimal", "procps", "passwd"),
    *("libgomp1", "libffi8", "libssl3", "libsqlite3-0", "libbz2-1.0", "liblzma5", "zlib1g"),
    *("libuuid1", "libncursesw6", "libreadline8", "libexpat1"),
)
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_POLL_S: Final = 0.1
_BOUND_S: Final = 240.0
_ANSWERS_WITHIN_S: Final = 10.0  # who asks a machine that goes down may wait for ever
_REBOOT: Final = 133  # systemd-nspawn's exit status


def missing() -> str | None:
    """Why no machine can be made here; None: it can."""
    if os.geteuid() != 0:
        return "not root: no machine can be booted"
    for program in ("systemd-nspawn", "mmdebstrap"):
        if shutil.which(program) is None:
            return f"no {program}: install systemd-container and mmdebstrap"
    return None


class MachineError(Exception):
    """No machine can be made or booted here."""


class Machine:
    """One machine, off at first.

    Args:
        path: where its files lie.
        shared: directories that are in it at their own paths, writable.

    Raises:
        MachineError: no Debian can be installed: no network, no mirror.
    """

    def __init__(self, path: Path, shared: list[Path]) -> None:
        self.root = path / "root"
        made = subprocess.run(
            [
                *("mmdebstrap", "--variant=minbase", "--quiet"),
                *(f"--include={','.join(_PACKAGES)}", "bookworm", str(self.root)),
            ],
            check=False,
            capture_output=True,
            text=True,
        )
        if made.returncode != 0:
            raise MachineError(f"mmdebstrap can't install a Debian: {made.stderr[-500:]}")
        (self.root / "root").chmod(0o755)  # Python may lie below it
        subprocess.run(["useradd", "--root", str(self.root), "-m", "ada"], check=True)
        read_only = {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY}
        self._binds = [f"--bind-ro={one}" for one in sorted(read_only)]
        self._binds += [f"--bind={one}" for one in shared]
        # systemd-nspawn has a directory for each name, which two machines must not share.
        self._name = f"ckptd-{os.getpid()}-{time.monotonic_ns()}"
        self._console = path / "console"
        self._off = threading.Event()
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None

    def on(self) -> None:
        """Boot it, and wait until its services were started.

        Raises:
            MachineError: it does not come up.
        """
        self._off.clear()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        self.wait_until_up()

    def _keep(self) -> None:
        """Until it is switched off: systemd-nspawn ends at each reboot."""
        code = _REBOOT
        while code == _REBOOT and not self._off.is_set():
            with self._console.open("ab") as console:
                # In a space of process ids of its own, so that a cut reaches everything.
                self._nspawn = subprocess.Popen(
                    [
                        *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
                        *("systemd-nspawn", "--quiet", "--keep-unit", "--register=no", "--boot"),
                        *("--directory", str(self.root), f"--machine={self._name}"),
                        *("--console=pipe", "--link-journal=no", *self._binds),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                )
                code = self._nspawn.wait()

    def wait_until_up(self, before: str = "") -> str:
        """Wait for a boot other than the one before; its id."""
        waited = 0.0
        while waited < _BOUND_S:
            threading.Event().wait(_POLL_S)
            waited += _POLL_S
            try:
                text = self.run(
                    "cat /proc/sys/kernel/random/boot_id; systemctl is-system-running",
                    within_s=_ANSWERS_WITHIN_S,
                )
            except (RuntimeError, psutil.Error, subprocess.TimeoutExpired):
                continue
            words = text.split()
            if len(words) == 2 and words[0] != before and words[1] in ("running", "degraded"):
                return words[0]
        raise MachineError(f"it is not up: {self._console.read_text(errors='replace')[-2000:]}")

    def run(self, command: str, user: str | None = None, within_s: float = _BOUND_S) -> str:
        """Run a shell command in it; its output.

        Raises:
            RuntimeError: it is off.
            subprocess.TimeoutExpired: no answer came.
        """
        first = self._first_process()
        shell = ["sh", "-c", command]
        if user is not None:
            shell = ["runuser", "-u", user, "--", "env", f"HOME=/home/{user}", *shell]
        done = subprocess.run(
            [
                *("nsenter", "-t", str(first), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"),
                *("env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8", *shell),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s,
            check=False,
        )
        return done.stdout

    def reboot(self) -> None:
        """`systemctl reboot`, until it is up again."""
        before = self.run("cat /proc/sys/kernel/random/boot_id").strip()
        self.run("systemctl reboot")
        self.wait_until_up(before)

    def cut(self) -> None:
        """Cut its power: nothing in it gets to say goodbye."""
        self._off.set()
        if self._nspawn is not None:
            for process in psutil.Process(self._nspawn.pid).children(recursive=True):
                process.kill()
            self._nspawn.kill()
        if self._keeper is not None:
            self._keeper.join(_BOUND_S)

    def _first_process(self) -> int:
        """Its process 1, as it is called here."""
        if self._nspawn is None or self._nspawn.poll() is not None:
            raise RuntimeError("it is off")
        for process in psutil.Process(self._nspawn.pid).children(recursive=True):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                # Two spaces of process ids down: ours, that of unshare, its own.
                if line.startswith("NSpid:") and line.split()[3:] == ["1"]:
                    return process.pid
        raise RuntimeError("it has no first process yet")
