"""The command's process, its tree of descendants, and the end of both.

Rules:

1. The command runs in a session of its own: a Ctrl-C in the terminal reaches the supervisor alone.
2. The supervisor is a subreaper: a descendant whose parent died becomes its child and can be found,
   however it daemonised itself.
3. The command's own exit is read by its pid before anything else is reaped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_PR_SET_CHILD_SUBREAPER: Final = 36


def become_subreaper() -> None:
    """Adopt descendants whose parents die.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl(PR_SET_CHILD_SUBREAPER)")


class Child:
    """The command's own process.

    Args:
        argv: the command; its first word is looked up in the environment's PATH.
        cwd: where it runs.
        environment: all of it.
        output: the descriptor for its standard output and error.
        inherited: descriptors that stay open in it.

    Raises:
        OSError: it could not be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        output: int,
        inherited: Sequence[int],
    ) -> None:
        self._process = subprocess.Popen(  # the handle lives as long as the child
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._pidfd

    def exit_code(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to this one process, if it still runs."""
        if self._process.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Let go of the handle."""
        os.close(self._pidfd)


def kill_tree() -> None:
    """Kill every descendant of this process."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def tree_is_gone(child: Child | None) -> bool:
    """Whether no descendant is left; reaps those that ended, the command first."""
    if child is not None and child.exit_code() is None:
        return False
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    # A zombie counts: its parent is about to die too, then it is ours to reap.
    return not psutil.Process().children(recursive=True)


def started_s(pid: int) -> float | None:
    """When a process was started; None: there is none. Pid and start name one process for ever."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time()
    except psutil.NoSuchProcess:
        return None


def kill_orphans(pid: int, started: float) -> None:
    """Kill a process that a dead supervisor left behind, and its descendants."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() == started:
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
