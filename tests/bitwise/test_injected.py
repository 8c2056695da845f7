"""What can befall a training process: recovered from, no process survives, the bits are right.

Each happens at a step for which there is a durable state, and a newer one in memory. A supervisor
that is killed: see test_interruptions.py; disks in every other trouble: tests/disks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from conftest import BOUND_S, SCRIPTS, Workshop, limited, wait_until
from mounts import mounted

from ckptd.supervisor import server
from ckptd.supervisor.run import Run

SCRIPT = str(SCRIPTS / "injected.py")
PY_SPY = Path(sys.executable).with_name("py-spy")
#: Steps at which the script has states, see there: the safe point after the item takes them.
DURABLE, HELD = 5, 9
HANG_AFTER_S = 4
OFTEN = ("--overhead", "1")
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the script gives without ckptd, and without a fault."""
    workshop = Workshop(tmp_path_factory.mktemp("plain"))
    workshop.plain(sys.executable, SCRIPT, "none", str(workshop.path / "result"))
    return (workshop.path / "result").read_text()


def without_py_spy(path: Path) -> Path:
    """This Python in an environment of its own, with the same libraries and no programs."""
    (path / "bin").mkdir(parents=True)
    (path / "lib").symlink_to(Path(sys.prefix, "lib"))
    home = Path(sys.base_prefix, "bin")
    (path / "pyvenv.cfg").write_text(f"home = {home}\n")
    python = path / "bin/python"
    python.symlink_to(home / "python3")
    return python


def run(
    workshop: Workshop,
    expected: str,
    fault: str,
    *options: str,
    through: Sequence[str] = (),
    python: str | Path = sys.executable,
) -> str:
    """Launch the script; what the supervisor said. It must finish with the plain script's bits."""
    result = workshop.path / "result"
    command = [*workshop.command(*OFTEN, *options), str(python), SCRIPT, fault, str(result)]
    command[0] = str(python)
    launched = workshop.run(*through, *command)
    assert launched.returncode == 0, launched.stderr
    assert (workshop.path / "happened").exists(), "it never happened"
    assert result.read_text() == expected
    resumed_from_memory(workshop.journal())
    found = psutil.process_iter(["cmdline"])
    left = [process for process in found if str(result) in (process.info["cmdline"] or [])]
    assert not left, f"{left} are left"
    return launched.stderr


def resumed_from_memory(events: list[dict]) -> None:
    """From the newest state, which is made durable before anybody starts again."""
    kinds = [e["event"] for e in events]
    starts = [(e["step"], e["of"]) for e in events if e["event"] == "started"]
    assert starts == [(None, "disk"), (HELD, "memory")]
    assert [e["step"] for e in events if e["event"] == "durable"] == [DURABLE, HELD]
    saved = next(n for n, e in enumerate(events) if e["event"] == "durable" and e["step"] == HELD)
    assert min(map(kinds.index, {"exited", "hang"} & set(kinds))) < saved
    assert saved < len(kinds) - 1 - kinds[::-1].index("started")


def ends(workshop: Workshop) -> list[dict[str, object]]:
    return [e for e in workshop.journal() if e["event"] in ("exited", "hang")]


@pytest.mark.parametrize(
    ("fault", "code"),
    [("segfault", -11), ("abort", -6), ("exception", 1), ("exit", 3), ("fork bomb", -9)],
)
def test_death(workshop: Workshop, expected: str, fault: str, code: int) -> None:
    run(workshop, expected, fault)
    assert [event.get("code") for event in ends(workshop)] == [code, 0]


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("deadlock", "in deadlock"),
        ("deadlock with the interpreter's lock", "in deadlock_with_interpreter"),
        ("ignores everything", "the job hangs"),
    ],
)
def test_hang(workshop: Workshop, expected: str, fault: str, where: str) -> None:
    """Killed and started again; the log says where it hung, as far as anybody can tell."""
    python = without_py_spy(workshop.path / "bare")
    through = ("env", f"PATH={python.parent}:/usr/bin:/bin")
    options = ("--hang-after", str(HANG_AFTER_S))
    said = run(workshop, expected, fault, *options, through=through, python=python)
    assert "the job hangs" in said
    assert ends(workshop)[0]["event"] == "hang"
    log = (workshop.path / "runs/job/log").read_text()
    assert where in said + log
    assert "[ckptd] process" in log


@pytest.mark.skipif(not PY_SPY.exists(), reason=f"no {PY_SPY}: pip install py-spy")
def test_hang_seen_by_py_spy(workshop: Workshop, expected: str) -> None:
    """It looks from outside, so that also a process which ignores everything is seen. It is found
    beside the interpreter, whatever PATH says."""
    through = ("env", "PATH=/usr/bin:/bin")
    run(
        workshop, expected, "ignores everything", "--hang-after", str(HANG_AFTER_S), through=through
    )
    assert "ignore_everything (" in (workshop.path / "runs/job/log").read_text()


def test_stopped_is_no_hang(workshop: Workshop, expected: str) -> None:
    """A stopped process is left alone, however long, and goes on as if nothing had been."""
    result = workshop.path / "result"
    command = workshop.command(*OFTEN, "--hang-after", str(HANG_AFTER_S))
    launched = subprocess.Popen(
        [*command, sys.executable, SCRIPT, "stopped", str(result)],
        cwd=workshop.path,
        env=workshop.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launched.stderr is not None
    line = next(line for line in launched.stderr if "was stopped" in line)

    def age_s() -> float:
        """Of the checkpoint, by the supervisor's clock."""
        holder = Run(workshop.path / "runs/job").supervisor()
        assert holder is not None
        return float(server.ask(holder.socket, "status", BOUND_S).facts["durable age s"] or 0)

    until_s = age_s() + 3 * HANG_AFTER_S
    wait_until(lambda: launched.poll() is not None or age_s() > until_s)
    os.kill(int(line.split("process ")[1].split()[0]), signal.SIGCONT)
    assert launched.wait(BOUND_S) == 0
    launched.stderr.close()
    assert [event["event"] for event in ends(workshop)] == ["exited"]
    assert result.read_text() == expected


def test_out_of_memory(workshop: Workshop, expected: str) -> None:
    """The kernel kills it at its group's limit: that is said, with the limit."""
    with limited(1 << 30) as through:
        said = run(workshop, expected, "out of memory", through=through)
    assert "SIGKILL" in said
    assert "the kernel killed a process of its control group, which may use 1024 MiB" in said
    assert "out of memory" in str(ends(workshop)[0]["cause"])


def test_full_disk(workshop: Workshop, expected: str) -> None:
    """Killed while nothing can be made durable: it goes on from memory, and is durable again."""
    result, runs = workshop.path / "result", workshop.path / "runs"
    with mounted(runs, "-t", "tmpfs", "-o", "size=4m", "none"):
        launched = subprocess.Popen(
            [*workshop.command(*OFTEN), sys.executable, SCRIPT, "a full disk", str(result)],
            cwd=workshop.path,
            env=workshop.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert launched.stderr is not None
        said = []
        for line in launched.stderr:
            said.append(line)
            if "starting it again" in line:
                (runs / "job/filler").unlink(missing_ok=True)
        assert launched.wait(BOUND_S) == 0
        launched.stderr.close()
    told = "".join(said)
    assert "No space left on device" in told
    assert "attempt 2, from step 13 in memory" in told
    assert "durable again, at step 13" in told
    assert result.read_text() == expected
