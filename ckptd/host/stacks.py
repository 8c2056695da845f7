"""What the processes of a job are doing, for a job that hangs.

Of each process its state and where in the kernel it waits; then its Python stacks: by py-spy, if
that is installed and allowed to look, which needs nothing of the process; else the process writes
them itself (`faulthandler`, which needs no interpreter lock) when it gets SIGQUIT.

Rule: SIGQUIT goes only to a process that has a handler for it. It would end any other.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

#: The worker has `faulthandler` write its stacks at this signal.
SIGNAL: Final = signal.SIGQUIT
_PY_SPY_BOUND_S: Final = 5.0
_WRITES_WITHIN_S: Final = 1.0


def show(write: Callable[[str], object]) -> None:
    """Write down what every descendant of this process is doing.

    Those that write their stacks themselves do so to their own standard error, within a second.

    Args:
        write: is given whole lines.
    """
    # Beside the interpreter: a virtual environment need not be in PATH to be used.
    py_spy = shutil.which("py-spy") or shutil.which(Path(sys.executable).with_name("py-spy"))
    asked = False
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):  # it ended meanwhile
            write(_described(process))
            stacks = None if py_spy is None else _stacks(py_spy, process.pid)
            if stacks is not None:
                write(stacks)
            elif _catches(process.pid):
                process.send_signal(SIGNAL)
                asked = True
    if asked:
        time.sleep(_WRITES_WITHIN_S)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped: by SIGSTOP, or by a debugger."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return False  # it ended
    return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def _described(process: psutil.Process) -> str:
    command = " ".join(process.cmdline()) or process.name()
    where = ""
    with suppress(OSError):
        where = Path(f"/proc/{process.pid}/wchan").read_text(encoding="ascii").strip("0")
    waits = f", in the kernel's {where}" if where else ""
    return f"[ckptd] process {process.pid} is {process.status()}{waits}: {command[:200]}\n"


def _stacks(py_spy: str, pid: int) -> str | None:
    """What py-spy says; None: it may not look, or it is no Python."""
    try:
        done = subprocess.run(
            [py_spy, "dump", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=_PY_SPY_BOUND_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def _catches(pid: int) -> bool:
    """Whether a process has a handler for the signal."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return False
