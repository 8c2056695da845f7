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
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_PR_SET_CHILD_SUBREAPER: Final = 36
_ADDR_NO_RANDOMIZE: Final = 0x0040000
_ASK_PERSONALITY: Final = 0xFFFFFFFF

#: What this starts is ended by it when it is told to end, and left behind when it is killed.
_ENDS_OTHERS: Final = "srun"
_ENDS_OTHERS_WITHIN_S: Final = 4.0

# Fields of /proc/PID/stat, counted from the one after the name.
_STAT_STATE: Final = 0
_STAT_START: Final = 19


def become_subreaper() -> None:
    """Adopt descendants whose parents die.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl(PR_SET_CHILD_SUBREAPER)")


def fix_addresses() -> None:
    """Have everything that this process starts from now on use the same memory addresses each time.

    Raises:
        OSError: the kernel refused (containers often forbid it).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    now = libc.personality(_ASK_PERSONALITY)
    if now < 0 or libc.personality(now | _ADDR_NO_RANDOMIZE) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "personality(ADDR_NO_RANDOMIZE)")


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


class Stranger:
    """A process of the job that is no descendant of ours: behind `srun`, slurmstepd started it.

    Args:
        pidfd: names it for ever, whoever gets its number later.
    """

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    @classmethod
    def of(cls, pid: int) -> Stranger | None:
        """The process of this number; None: it ended, can't be seen, or is a descendant."""
        try:
            pidfd = os.pidfd_open(pid)
            if os.getpid() not in [one.pid for one in psutil.Process(pid).parents()]:
                return cls(pidfd)
        except (OSError, psutil.Error):
            return None
        os.close(pidfd)
        return None

    def kill(self) -> None:
        """Kill it, if it runs still."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def is_gone(self) -> bool:
        """Whether it has ended."""
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        return bool(ended.poll(0))

    def close(self) -> None:
        """Let go of the handle."""
        os.close(self._pidfd)


class Killer:
    """Kills every descendant of this process.

    An `srun` is told to end instead, for some seconds: it kills what it has started at once, on all
    nodes, and then ends. If it were killed, that would go on, as it is no descendant of ours, and
    hold the processors that the next `srun` waits for.
    """

    def __init__(self) -> None:
        self._told_s: dict[psutil.Process, float] = {}

    def kill(self, now_s: float) -> None:
        """Kill them; to be called until none is left, as some may just have been forked."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if not self._is_told(process, now_s):
                    process.kill()

    def _is_told(self, process: psutil.Process, now_s: float) -> bool:
        if process not in self._told_s:
            if process.name() != _ENDS_OTHERS:
                return False
            process.terminate()
            process.resume()
            self._told_s[process] = now_s
        return now_s - self._told_s[process] < _ENDS_OTHERS_WITHIN_S


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
    """When a process was started, in seconds since the boot; None: there is none, or it ended.

    Pid, start and boot name one process for ever. Read from the kernel, since psutil's create_time
    counts from 1970 and moves when the clock is set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name, in brackets, may hold anything
    if fields[_STAT_STATE] in ("Z", "X"):
        return None
    return int(fields[_STAT_START]) / os.sysconf("SC_CLK_TCK")


def kill_orphans(pid: int, started: float) -> None:
    """Kill what a dead supervisor left behind: a command, its descendants, and its session.

    The session finds a worker whose parent, a shell, is dead too. Its number is the command's pid,
    which the kernel gives to nobody else while one process of the session lives.
    """
    with suppress(psutil.NoSuchProcess):
        command = psutil.Process(pid)
        if started_s(pid) not in (started, None):
            return  # another process has the number by now: nothing of the command is left
        _kill([*command.children(recursive=True), command])
    _kill([process for process in psutil.process_iter() if _session(process.pid) == pid])


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
