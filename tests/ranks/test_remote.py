"""Ranks on other machines, from end to end: they see nothing of the supervisor's machine but the
run's directory and a TCP port."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Workshop, wait_until
from launched import (
    Launched,
    checkpoints,
    no_leftovers,  # noqa: F401  # a fixture for every test here
    wait_gone,
)

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
SCRIPT = str(HERE / "remote_train.py")
LISTEN = ("--listen", "localhost")


def torchrun(ranks: int) -> tuple[str, ...]:
    head = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    )
    return (*head, "--no-python", "sh", str(HERE / "elsewhere.sh"), sys.executable, SCRIPT)


@pytest.fixture(scope="module")
def sockets() -> Iterator[str]:
    """Where the supervisors' sockets are: hidden from the ranks elsewhere."""
    path = tempfile.mkdtemp(prefix="ckptd-test-")
    hides = ["unshare", "--mount", "mount", "-t", "tmpfs", "elsewhere", path]
    if subprocess.run(hides, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What the plain script comes to, by the number of ranks."""
    found = {}
    for ranks in (2, 3):
        workshop = Workshop(tmp_path_factory.mktemp("plain"))
        workshop.plain(*torchrun(ranks))
        found[ranks] = results(workshop)
    return found


def results(workshop: Workshop) -> dict[str, str]:
    """What all ranks wrote."""
    kinds = ("losses", "final")
    return {p.name: p.read_text() for kind in kinds for p in workshop.path.glob(f"{kind}-*.txt")}


def launched(
    workshop: Workshop, ranks: int, elsewhere: str, sockets: str, *options: str, **more: str
) -> Launched:
    environment = {"ELSEWHERE": elsewhere, "TMPDIR": sockets, "SLOW": "0.03", **more}
    return Launched(workshop, *torchrun(ranks), options=(*LISTEN, *options), **environment)


def attached(workshop: Workshop) -> list[dict[str, object]]:
    return [event for event in workshop.journal() if event["event"] == "rank attached"]


def processes(job: Launched) -> dict[int, psutil.Process]:
    """The ranks' processes."""
    pids = {int(str(e["rank"])): int(str(e["pid"])) for e in attached(job.workshop)}
    return {rank: psutil.Process(pid) for rank, pid in pids.items()}


@pytest.mark.parametrize(
    ("ranks", "elsewhere"), [pytest.param(2, "1", marks=pytest.mark.nightly), (3, "0 2")]
)
def test_a_stop_loses_nothing(
    workshop: Workshop,
    sockets: str,
    plain: dict[int, dict[str, str]],
    ranks: int,
    elsewhere: str,
) -> None:
    """SIGTERM in the middle of an epoch: all flush at one safe point, and go on from there as if
    nothing had been; bitwise what the plain script comes to. No launcher takes it for a failure."""
    job = launched(workshop, ranks, elsewhere, sockets)
    job.wait_for_step(12)
    assert job.signal(signal.SIGTERM).ends() == 75, job.told()
    assert {e["rank"] for e in attached(workshop) if e.get("remote")} == {
        int(rank) for rank in elsewhere.split()
    }
    (stopped,) = checkpoints(workshop)
    assert 12 <= stopped <= job.steps()[-1] + 1
    again = launched(workshop, ranks, elsewhere, sockets, SLOW="0")
    assert again.ends() == 0, again.told()
    assert results(workshop) == plain[ranks]


def test_a_killed_rank_is_restored_over_the_network(
    workshop: Workshop, sockets: str, plain: dict[int, dict[str, str]]
) -> None:
    """After SIGKILL of a rank elsewhere all go on from the newest state in memory, which goes
    there over the network."""
    job = launched(workshop, 2, "1", sockets)
    at = job.wait_for_step(10)
    job.signal(signal.SIGUSR2)
    wait_until(lambda: any(event["event"] == "durable" for event in workshop.journal()))
    processes(job)[1].kill()
    assert job.ends() == 0, job.told()
    starts = [(e["of"], e["step"]) for e in workshop.journal() if e["event"] == "started"]
    assert len(starts) == 2
    assert starts[1][0] == "memory"
    assert int(str(starts[1][1])) >= at
    assert results(workshop) == plain[2]


def test_a_killed_supervisor_is_noticed(workshop: Workshop, sockets: str) -> None:
    """Ranks elsewhere save together with those beside it, and end."""
    job = launched(workshop, 2, "1", sockets)
    job.wait_for_step(5)
    ranks = list(processes(job).values())
    job.kill()
    wait_gone(ranks)
    assert len(checkpoints(workshop)) == 1


DEAF = """
import os, threading
from ckptd import wire
from ckptd.worker.arena import Arenas
from ckptd.worker.link import Link
link = Link("/nowhere", wire.Hello(wire.PROTOCOL, os.getpid(), 0, 1, {}), Arenas(), print)
print("attached", flush=True)
threading.Event().wait()
"""


def test_who_does_not_end_is_killed_there(workshop: Workshop) -> None:
    """A rank that hangs is no descendant of the supervisor, and may be on another machine: it ends
    all the same, at once, and the supervisor does not wait longer than for that."""
    job = Launched(
        workshop,
        *("sh", "-c", "echo remote=$CKPTD_REMOTE; sleep 1000"),
        options=(*LISTEN, "--grace", "1"),
    )
    invitation = job.wait_for("remote=").removeprefix("remote=")
    environment = {**workshop.environment(), "CKPTD_REMOTE": invitation}
    rank = subprocess.Popen(
        [sys.executable, "-c", DEAF], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "attached\n"
    wait_until(lambda: any(event["event"] == "attached" for event in workshop.journal()))
    began_s = time.monotonic()
    job.signal(signal.SIGTERM).ends()
    assert time.monotonic() - began_s < 4, job.told()
    assert rank.wait(1) == -signal.SIGKILL
    rank.stdout.close()


def test_a_machine_does_not_see_the_run(workshop: Workshop, sockets: str) -> None:
    """It is said at once, and before that machine takes sound checkpoints for damaged ones."""
    runs = workshop.path / "runs"
    runs.mkdir()
    job = launched(workshop, 2, "1", sockets, HIDDEN=str(runs))
    assert job.ends() == 70, job.told()
    job.wait_for("where rank 1 runs, does not see the run's directory")
    assert [e["event"] for e in workshop.journal()].count("started") == 1
