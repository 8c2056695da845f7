"""Under a real Slurm: interrupted in each way that Slurm knows, a job ends as if it had not been.

Nothing here waits for a time: the script says when it can be interrupted, and Slurm when a job is
where it should be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import TRACKERS, Batch, Cluster, why_not
from conftest import SCRIPTS, Workshop

pytestmark = pytest.mark.real

LAUNCH = f"{sys.executable} -m ckptd launch"
TRAIN = f"{sys.executable} {SCRIPTS}/train.py"
INTERRUPTED = {"INTERRUPT": "mid-epoch:WAIT"}


@pytest.fixture(scope="session", params=TRACKERS)
def whole_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One Slurm for all tests of a tracker: it starts in a second or two."""
    why = why_not(request.param)
    if why is not None:
        pytest.skip(f"no Slurm with {request.param}: {why}")
    cluster = Cluster(request.param)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """That cluster without any job."""
    yield whole_cluster
    whole_cluster.clear()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The plain script's result and metrics."""
    path = tmp_path_factory.mktemp("plain")
    Workshop(path).plain(sys.executable, str(SCRIPTS / "plain.py"), str(path), "0")
    return result(path)


def result(path: Path) -> tuple[bytes, bytes]:
    """Weights, optimizer state, losses and random states; and the metrics file."""
    return (path / "result.safetensors").read_bytes(), (path / "metrics.csv").read_bytes()


def training(cluster: Cluster, workshop: Workshop, *options: str, body: str = "") -> Batch:
    """A job that trains, with ckptd as its batch process."""
    words = f"--dir {workshop.path}/runs {' '.join(options)} -- {TRAIN} {workshop.path} 0"
    return Batch(cluster, workshop, body=f"{body}exec {LAUNCH} {words}\n")


def begun(batch: Batch, *options: str, **environment: str) -> str:
    """Submit a job and wait until it stands in the middle of an epoch; its id."""
    once = batch.path / "once"
    job = batch.submit(*options, **INTERRUPTED, INTERRUPT_ONCE=str(once), **environment)
    batch.wait_until(once.exists, "the middle of an epoch")
    return job


def check_end(cluster: Cluster, batch: Batch, job: str, reference: tuple[bytes, bytes]) -> None:
    """The job completed, bit for bit as the plain script, and left no process."""
    cluster.wait_for(job, JobState="COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|PREEMPTED")
    assert cluster.show(job)["JobState"] == "COMPLETED", batch.told()
    assert result(batch.path) == reference
    assert cluster.processes(job) == []


def preempt(cluster: Cluster, node: str) -> str:
    """A job of higher priority takes a whole node; it ends by itself when it has run."""
    return cluster.do(
        *("sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodelist={node}"),
        *("--output=/dev/null", "--wrap=true"),
    )


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_warning_signal(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes], signal: str
) -> None:
    """A signal to the batch process: saved, put back into the queue by ckptd, and continued."""
    batch = training(cluster, workshop)
    job = begun(batch)
    cluster.do("scancel", "--batch", f"--signal={signal}", job)
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)
    assert f"asked Slurm to put job {job} back into the queue" in batch.told()
    assert f"Slurm job {job}, restart 1, partition low, until " in batch.told()
    events = workshop.journal(f"slurm-{job}")
    assert [e["event"] for e in events if e["event"] in ("stopped", "restored", "finished")] == [
        *("stopped", "restored", "finished")
    ]
