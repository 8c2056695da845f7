"""What all tests share: how a real job is launched and its result read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
BOUND_S = 240
MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is launched in tests is no job of this user that goes on after a reboot."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session", autouse=True)
def usual_signals() -> None:
    """Under nohup, or behind a shell's "&", some are ignored, and so they would be in all jobs."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition: Callable[[], object]) -> None:
    """Until it is true; the test's own time limit is the bound."""
    while not condition():
        threading.Event().wait(0.02)


@contextmanager
def limited(length: int) -> Iterator[list[str]]:
    """The first words of a command that may use so many bytes of memory."""
    group = MEMORY / f"ckptd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(length))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    finally:
        group.rmdir()


@dataclass
class Workshop:
    """A directory for one job, and the commands to run it.

    Attributes:
        prefix: the first words of `ckptd launch`, to start it through another command.
    """

    path: Path
    prefix: Sequence[str] = ()

    def environment(self, **more: str) -> dict[str, str]:
        """Ours, without what would change a job's bits; restarts without a pause."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CKPTD", "SLURM"))}
        return {**kept, "CKPTD_BACKOFF": "0.01", "OMP_NUM_THREADS": "1", **more}

    def command(self, *options: str, name: str = "job") -> list[str]:
        """`ckptd launch` with its runs in this directory, and no requests but those of the test."""
        if "--overhead" not in options:
            options = ("--overhead", "0", *options)
        head = [sys.executable, "-m", "ckptd", "launch", "--dir", str(self.path / "runs")]
        return [*self.prefix, *head, "--name", name, *options, "--"]

    def launch(
        self, *argv: str, options: tuple[str, ...] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command under `ckptd launch` until the supervisor ends."""
        return self.run(*self.command(*options), *argv, **environment)

    def run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run any command until it ends, and keep what it says."""
        return subprocess.run(
            argv,
            cwd=self.path,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )

    def plain(self, *argv: str) -> None:
        """Run a command without ckptd."""
        subprocess.run(argv, cwd=self.path, env=self.environment(), check=True, timeout=BOUND_S)

    def journal(self, name: str = "job") -> list[dict[str, object]]:
        """What the supervisor wrote down."""
        from ckptd.supervisor import journal

        return journal.read(self.path / "runs" / name / "journal.jsonl")


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """An empty directory to run a job in."""
    return Workshop(tmp_path)
