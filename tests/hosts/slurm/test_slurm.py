"""Under a real Slurm: interrupted in each way that Slurm knows, a job ends as if it had not been.

Nothing here waits for a time: the script says when it can be interrupted, and Slurm when a job is
where it should be.
"""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cluster import GRACE_S, KILL_WAIT_S, TRACKERS, Batch, Cluster, why_not
from conftest import SCRIPTS, Workshop

from ckptd.supervisor.run import Run

pytestmark = pytest.mark.real

TORCHRUN = f"{sys.executable} -m torch.distributed.run"
LAUNCH = f"{sys.executable} -m ckptd launch --overhead 0"
SLURM = Path(__file__).parents[3] / "slurm"
TRAIN = f"{sys.executable} {SCRIPTS}/train.py"
TASK = "$SLURM_ARRAY_TASK_ID"
PRINT = ("slurm-script", "--gpus", "0", "--cpus", "1", "--partition", "low", "--time", "60")
INTERRUPTED = {"INTERRUPT": "mid-epoch:WAIT"}
#: One training over two nodes: how its ranks are started, how many there are, what is asked for.
HOW = ["several-nodes.sbatch", "srun python"]
RANKS = {"several-nodes.sbatch": 2, "srun python": 3}
ASKED = {"several-nodes.sbatch": (), "srun python": ("--nodes=2", "--ntasks=3")}
STRUCK = 9  # how many steps are done, at least, when `ranks.py` comes to "1.3"
#: What the scripts in slurm/ ask for that is not on this machine -> what is.
HERE = {
    "--partition=preemptible": "--partition=low",
    "#SBATCH --gres=gpu:1\n": "",
    "#SBATCH --gpus-per-task=1\n": "",
    "#SBATCH --gpus-per-node=8\n": "",
    "--cpus-per-task=8\n": "--cpus-per-task=1\n",
    "--cpus-per-task=64\n": "--cpus-per-task=1\n",
}
#: The ordinary run has time for both only where the tracker decides who is ended.
ONE_TRACKER = pytest.mark.parametrize(
    "whole_cluster",
    [TRACKERS[0], pytest.param(TRACKERS[1], marks=pytest.mark.nightly)],
    indirect=True,
)


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


def run_of(workshop: Workshop, name: str) -> Run:
    """A run's directory."""
    return Run(workshop.path / "runs" / name)


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


@ONE_TRACKER
def test_requeued_by_somebody_else(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """`scontrol requeue` from outside: saved within KillWait, and not asked for a second time."""
    batch = training(cluster, workshop)
    job = begun(batch)
    cluster.do("scontrol", "requeue", job)
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)
    assert f"Slurm has put job {job} back into the queue" in batch.told()
    assert "asked Slurm" not in batch.told()
    assert cluster.show(job)["Restarts"] == "1"


def test_cancelled(cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]) -> None:
    """A cancelled job is saved and stays cancelled; a new job of the same name continues it."""
    batch = training(cluster, workshop, "--name job")
    job = begun(batch)
    cluster.do("scancel", job)
    shown = cluster.wait_for(job, JobState="CANCELLED")
    batch.wait_until(lambda: cluster.processes(job) == [], "the end of the batch process")
    assert f"job {job} was cancelled (COMPLETING)" in batch.told()
    assert shown["Restarts"] == "0"
    assert [e["event"] for e in workshop.journal()][-1] == "stopped"
    again = batch.submit(**INTERRUPTED, INTERRUPT_ONCE=str(batch.path / "once"))
    check_end(cluster, batch, again, reference)
    # The requeue that would have been asked for would have had time to show by now.
    assert cluster.show(job)["JobState"] == "CANCELLED"
    assert any(event["event"] == "restored" for event in workshop.journal())


@ONE_TRACKER
def test_stopped_by_its_owner(cluster: Cluster, workshop: Workshop) -> None:
    """`ckptd stop` saves the job and ends it: nobody wanted it back in the queue."""
    batch = training(cluster, workshop)
    job = begun(batch)
    words = ("stop", "--dir", f"{workshop.path}/runs", f"slurm-{job}")
    subprocess.run([sys.executable, "-m", "ckptd", *words], check=True, capture_output=True)
    shown = cluster.wait_for(job, JobState="COMPLETED|FAILED|CANCELLED")
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "75:0", "0")
    assert "not put back into the queue" in batch.told()
    assert workshop.journal(f"slurm-{job}")[-1]["event"] == "stopped"


def test_preempted_without_a_grace(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """Preempted at once: Slurm sends SIGTERM and requeues the job itself."""
    batch = training(cluster, workshop)
    job = begun(batch, "--exclusive")
    other = preempt(cluster, cluster.show(job)["NodeList"])
    cluster.wait_for(other, JobState="COMPLETED")
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)
    assert f"Slurm has put job {job} back into the queue" in batch.told()


@ONE_TRACKER
def test_preempted_with_a_warning(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """Preempted with a grace, and told so at its beginning: the job makes way and comes back.

    Slurm 22.05 takes a job that ends within the grace for done, whatever --requeue says.
    """
    batch = training(cluster, workshop)
    job = begun(batch, "--exclusive", "--partition=graced", "--signal=B:USR1@60")
    other = preempt(cluster, cluster.show(job)["NodeList"])
    cluster.wait_for(other, JobState="COMPLETED")
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)
    told = batch.told()
    assert f"asked Slurm to put job {job} back into the queue" in told
    # The grace's end and KillWait, and not the 60 minutes of the time limit.
    left = int(told.partition("the host leaves ")[2].partition(" s")[0])
    assert 0 < left <= GRACE_S + KILL_WAIT_S


@ONE_TRACKER
def test_preempted_for_good(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """Where preemption cancels (PreemptMode=CANCEL), ckptd has the job put back."""
    batch = training(cluster, workshop)
    job = begun(batch, "--exclusive", "--partition=cancelled")
    other = preempt(cluster, cluster.show(job)["NodeList"])
    cluster.wait_for(other, JobState="COMPLETED")
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)
    assert f"asked Slurm to put job {job} back into the queue" in batch.told()


@ONE_TRACKER
def test_cancelled_after_a_preemption(cluster: Cluster, workshop: Workshop) -> None:
    """An earlier start's preemption is none of this one: a cancelled job stays cancelled."""
    body = "export INTERRUPT_ONCE=$PWD/once$SLURM_RESTART_COUNT\n"
    batch = training(cluster, workshop, body=body)
    job = batch.submit("--exclusive", **INTERRUPTED)
    batch.wait_until((batch.path / "once").exists, "the middle of an epoch")
    other = preempt(cluster, cluster.show(job)["NodeList"])
    cluster.wait_for(other, JobState="COMPLETED")
    cluster.start_requeued(job)
    cluster.wait_for(job, JobState="RUNNING")
    batch.wait_until(lambda: "from step" in batch.told(), "its second start")
    cluster.do("scancel", job)
    cluster.wait_for(job, JobState="CANCELLED")
    batch.wait_until(lambda: cluster.processes(job) == [], "the end of the batch process")
    assert f"job {job} was cancelled" in batch.told()


@ONE_TRACKER
def test_two_tasks_of_an_array(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """The tasks of an array are runs of their own, and one is requeued without the others."""
    body = f"mkdir -p task{TASK}\nexport INTERRUPT_ONCE=$PWD/once{TASK}\n"
    words = f"--dir {workshop.path}/runs -- {TRAIN} {workshop.path}/task{TASK} 0"
    batch = Batch(cluster, workshop, body=f"{body}exec {LAUNCH} {words}\n")
    array = batch.submit("--array=1-2", **INTERRUPTED)
    for task in "12":
        batch.wait_until((batch.path / f"once{task}").exists, f"task {task} mid-epoch")
    # The last task's own number is the array's: asking by that would requeue both.
    for task in "21":
        cluster.do("scancel", "--batch", "--signal=USR1", f"{array}_{task}")
        cluster.start_requeued(f"{array}_{task}")
    for task in "12":
        shown = cluster.wait_for(f"{array}_{task}", JobState="COMPLETED|FAILED|CANCELLED")
        assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), batch.told()
        assert result(batch.path / f"task{task}") == reference
        assert (workshop.path / "runs" / f"slurm-{array}_{task}").is_dir()


def test_two_tasks_of_one_srun(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """Each task of `srun ckptd launch` is a run of its own; the job is requeued for both."""
    inner = workshop.path / "task.sh"
    inner.write_text(
        "#!/bin/bash\nmkdir -p task$SLURM_PROCID\n"
        "export INTERRUPT_ONCE=$PWD/once$SLURM_PROCID\n"
        f"exec {LAUNCH} --dir {workshop.path}/runs -- {TRAIN} {workshop.path}/task$SLURM_PROCID 0\n"
    )
    inner.chmod(0o755)
    batch = Batch(cluster, workshop, body=f"srun {inner}\n")
    job = batch.submit("--ntasks=2", **INTERRUPTED)
    for task in "01":
        batch.wait_until((batch.path / f"once{task}").exists, f"task {task} mid-epoch")
    cluster.do("scancel", "--signal=USR1", job)  # to the steps
    cluster.start_requeued(job)
    cluster.wait_for(job, JobState="COMPLETED|FAILED|CANCELLED")
    assert cluster.show(job)["JobState"] == "COMPLETED", batch.told()
    for task in "01":
        assert result(batch.path / f"task{task}") == reference
        assert (workshop.path / "runs" / f"slurm-{job}-task{task}").is_dir()
    assert cluster.processes(job) == []


def behind_srun(cluster: Cluster, workshop: Workshop) -> Batch:
    """A job whose training is a step of its own: no descendant of ckptd, but of slurmstepd."""
    words = f"--dir {workshop.path}/runs -- srun --ntasks=1 {TRAIN} {workshop.path} 0"
    return Batch(cluster, workshop, body=f"exec {LAUNCH} {words}\n")


@ONE_TRACKER
@pytest.mark.parametrize(
    "how",
    [
        "USR1 to the batch process",
        "preempted",
        pytest.param("scancel", marks=pytest.mark.nightly),
    ],
)
def test_behind_srun(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes], how: str
) -> None:
    """`ckptd launch -- srun python train.py`: saved, put back into the queue, continued."""
    batch = behind_srun(cluster, workshop)
    job = begun(batch, "--exclusive")
    if how == "preempted":
        cluster.wait_for(preempt(cluster, cluster.show(job)["NodeList"]), JobState="COMPLETED")
    elif how == "scancel":
        cluster.do("scancel", job)
        cluster.wait_for(job, JobState="CANCELLED")
        batch.wait_until(lambda: cluster.processes(job) == [], "the end of the step")
        cluster.do("scontrol", "requeue", job)
    else:
        cluster.do("scancel", "--batch", "--signal=USR1", job)
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)
    assert any(event["event"] == "restored" for event in workshop.journal(f"slurm-{job}"))


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[bytes]]:
    """What the plain script comes to, over so many ranks."""

    @functools.cache
    def plain(ranks: int) -> list[bytes]:
        path = tmp_path_factory.mktemp(f"plain{ranks}")
        torchrun = (*TORCHRUN.split(), "--standalone", f"--nproc-per-node={ranks}")
        (path / "out").mkdir()
        Workshop(path).plain(*torchrun, str(SCRIPTS / "ranks.py"), "out")
        return results(path, ranks)

    return plain


def results(path: Path, ranks: int) -> list[bytes]:
    """Every loss, the weights, the optimizer's state and the generators, of each rank."""
    files = ("metrics-{}.csv", "result-{}.safetensors")
    names = [name.format(rank) for name in files for rank in range(ranks)]
    return [(path / "out" / name).read_bytes() for name in names]


def in_slurm(name: str) -> str:
    """A script of slurm/, but its first line, which asks for what there is here."""
    script = (SLURM / name).read_text().partition("\n")[2]
    for there, here in HERE.items():
        script = script.replace(there, here)
    return script


def over_two_nodes(cluster: Cluster, workshop: Workshop, how: str) -> Batch:
    """A job whose training has several ranks, on two nodes."""
    (workshop.path / "out").mkdir()
    if how == "srun python":
        inner = workshop.path / "rank.sh"
        inner.write_text(
            "#!/bin/bash\nexport RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS\n"
            f'export MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}\nexec "$@"\n'
        )
        inner.chmod(0o755)
        step = f"srun --kill-on-bad-exit=1 ./rank.sh {sys.executable} {SCRIPTS}/ranks.py out"
        body = f"exec {LAUNCH} --dir {workshop.path}/runs -- {step}\n"
        return Batch(cluster, workshop, body=body)
    body = in_slurm(how)
    for there, here in (
        ('exec ckptd launch --dir "$SLURM_SUBMIT_DIR/ckptd-runs"', f"exec {LAUNCH} --dir runs"),
        ("=1 torchrun ", f"=1 {TORCHRUN} "),
        ("--nproc-per-node=8 ", "--nproc-per-node=1 "),
        ('"$SLURMD_NODENAME:$((20000 + SLURM_JOB_ID % 10000))"', f"localhost:{free_port()}"),
        (" train.py'", f" --local-addr=127.0.0.1 {SCRIPTS}/ranks.py out'"),
    ):
        assert there in body
        body = body.replace(there, here)
    return Batch(cluster, workshop, body=body)


def check_several(cluster: Cluster, batch: Batch, job: str, reference: list[bytes]) -> None:
    """The job completed, bit for bit as the plain script on every rank, and left no process."""
    cluster.wait_for(job, JobState="COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|PREEMPTED")
    assert cluster.show(job)["JobState"] == "COMPLETED", batch.told()
    assert results(batch.path, len(reference) // 2) == reference
    assert cluster.processes(job) == []


@ONE_TRACKER
@pytest.mark.parametrize("name", sorted(path.name for path in SLURM.glob("*.sbatch")))
def test_the_scripts(cluster: Cluster, tmp_path: Path, name: str) -> None:
    """Slurm takes what is in slurm/, and bash understands it."""
    script = tmp_path / name
    script.write_text(f"#!/bin/bash\n{in_slurm(name)}")
    cluster.do("sbatch", "--test-only", str(script))
    cluster.do("bash", "-n", str(script))


@ONE_TRACKER
def test_ranks_on_two_nodes(
    cluster: Cluster, workshop: Workshop, several: Callable[[int], list[bytes]]
) -> None:
    """slurm/several-nodes.sbatch: a rank dies, and the step is started again; all ranks are
    saved at a warning, put back into the queue, continued, and come to the plain script's bits."""
    batch = over_two_nodes(cluster, workshop, "several-nodes.sbatch")
    job = batch.submit(STRIKES="0.4@1:KILL, 1.3@0:WAIT")
    batch.wait_until((batch.path / "out/struck-1").exists, "the second epoch's fourth step")
    cluster.do("scancel", "--batch", "--signal=USR1", job)
    cluster.start_requeued(job)
    check_several(cluster, batch, job, several(2))
    starts = [e["step"] for e in workshop.journal(f"slurm-{job}") if e["event"] == "started"]
    assert len(starts) == 3
    assert int(str(starts[2])) >= STRUCK, "what was done when the warning came was saved"


@pytest.mark.nightly
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("interrupted", ["USR1", "requeued", "preempted", "scancel", "a rank dies"])
def test_ranks_on_two_nodes_are_interrupted(
    cluster: Cluster,
    workshop: Workshop,
    several: Callable[[int], list[bytes]],
    how: str,
    interrupted: str,
) -> None:
    """By whatever signals Slurm sends to the batch process, the steps, or both."""
    batch = over_two_nodes(cluster, workshop, how)
    dies = interrupted == "a rank dies"
    strikes = f"0.2@0:USR2, 1.3@1:{'KILL' if dies else 'WAIT'}"
    job = batch.submit("--exclusive", *ASKED[how], STRIKES=strikes)
    batch.wait_until((batch.path / "out/struck-1").exists, "the second epoch's fourth step")
    if interrupted == "preempted":
        cluster.wait_for(preempt(cluster, cluster.nodes[1]), JobState="COMPLETED")
    elif interrupted == "requeued":
        cluster.do("scontrol", "requeue", job)
    elif interrupted == "scancel":
        cluster.do("scancel", job)
        cluster.wait_for(job, JobState="CANCELLED")
        batch.wait_until(lambda: cluster.processes(job) == [], "the end of the step")
        assert cluster.show(job)["JobState"] == "CANCELLED"
        cluster.do("scontrol", "requeue", job)
    elif interrupted == "USR1":
        cluster.do("scancel", "--batch", "--signal=USR1", job)
    if not dies:
        cluster.start_requeued(job)
    check_several(cluster, batch, job, several(RANKS[how]))
    restored = [e["step"] for e in workshop.journal(f"slurm-{job}") if e["event"] == "restored"]
    assert len(restored) == 1
    if not dies:
        assert int(str(restored[0])) >= STRUCK, "what was done then was saved"


@pytest.mark.nightly
def test_a_step_has_a_process_that_is_no_rank(
    cluster: Cluster, workshop: Workshop, several: Callable[[int], list[bytes]]
) -> None:
    """A rank dies, and srun would wait for ever: it is told to end, and ends all of its step.

    If it were killed, what it started would go on, and hold the processors of the next step.
    """
    batch = over_two_nodes(cluster, workshop, "srun python")
    inner = workshop.path / "rank.sh"
    beside = "test $SLURM_PROCID = 2 && if mkdir beside; then exec sleep 1000; else exit 0; fi\n"
    inner.write_text(inner.read_text().replace("export RANK", f"{beside}export RANK", 1))
    inner.write_text(inner.read_text().replace("$SLURM_NTASKS", "2", 1))
    batch.script.write_text(batch.script.read_text().replace(" --kill-on-bad-exit=1", ""))
    job = batch.submit(*ASKED["srun python"], STRIKES="0.4@1:KILL")
    check_several(cluster, batch, job, several(2))


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def test_srun_is_killed(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """The task that it leaves behind is ended before the next one is started."""
    batch = behind_srun(cluster, workshop)
    job = begun(batch)
    (pid,) = [event["pid"] for event in workshop.journal(f"slurm-{job}") if "pid" in event][:1]
    psutil.Process(pid).kill()
    check_end(cluster, batch, job, reference)


def test_the_batch_process_is_killed(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """Without its supervisor the job fails and nothing of it is left; requeued, it continues."""
    batch = training(cluster, workshop)
    job = begun(batch)
    supervisor = run_of(workshop, f"slurm-{job}").supervisor()
    assert supervisor is not None
    psutil.Process(supervisor.pid).kill()
    cluster.wait_for(job, JobState="FAILED")
    batch.wait_until(lambda: cluster.processes(job) == [], "the end of its processes")
    cluster.do("scontrol", "requeue", job)
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)


@ONE_TRACKER
def test_a_node_is_lost_and_its_job_runs_on(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """Two copies at once: the newer one fences the older one off, which ends with 69.

    Both nodes are this machine, so the older copy holds the run's lock, as on a network file
    system whose locks reach over all machines.
    """
    batch = training(cluster, workshop)
    job = begun(batch)
    node = cluster.show(job)["NodeList"]
    old = run_of(workshop, f"slurm-{job}").supervisor()
    assert old is not None
    assert (old.node, old.job, old.restart) == (node, f"Slurm job {job}", 0)
    cluster.kill_slurmd(node)
    cluster.do("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    cluster.start_requeued(job)
    shown = cluster.wait_for(job, JobState="COMPLETED|FAILED|CANCELLED")
    assert shown["JobState"] == "COMPLETED", batch.told()
    assert shown["NodeList"] != node
    assert result(batch.path) == reference
    batch.wait_until(lambda: cluster.processes(job) == [], "the end of the older copy")
    events = workshop.journal(f"slurm-{job}")
    assert [e["code"] for e in events if e["event"] == "fenced"] == [69]
    assert [e["event"] for e in events][-1] == "finished"
    assert f"in the place of the copy on {node} (process {old.pid})" in batch.told()
    assert "going on without it" not in batch.told()


@ONE_TRACKER
def test_no_progress(cluster: Cluster, workshop: Workshop) -> None:
    """Interrupted again and again before it gets anywhere, a job is not requeued for ever.

    The first interruption makes step 0 durable, which is progress; then nothing is.
    """
    body = "export INTERRUPT_ONCE=$PWD/once$SLURM_RESTART_COUNT\n"
    batch = training(cluster, workshop, "--max-requeues 1", body=body)
    job = batch.submit(INTERRUPT="before the first step:WAIT")
    for restart in range(3):
        once = batch.path / f"once{restart or ''}"
        batch.wait_until(once.exists, f"attempt {restart + 1}")
        cluster.do("scancel", "--batch", "--signal=USR1", job)
        if restart < 2:
            cluster.start_requeued(job, restart + 1)
    shown = cluster.wait_for(job, JobState="FAILED|COMPLETED|CANCELLED")
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "70:0")
    assert "gave up: interrupted 2 times in a row" in batch.told()
    assert "is not put back into the queue" in batch.told()


@ONE_TRACKER
@pytest.mark.parametrize("partition", ["low", pytest.param("graced", marks=pytest.mark.nightly)])
def test_no_progress_and_preempted(
    cluster: Cluster, workshop: Workshop, partition: str, reference: tuple[bytes, bytes]
) -> None:
    """Given up on while Slurm puts it back by itself, or might: held there until it is released."""
    body = "export INTERRUPT_ONCE=$PWD/once$SLURM_RESTART_COUNT\n"
    batch = training(cluster, workshop, "--max-requeues 0", body=body)
    options = ("--exclusive", f"--partition={partition}", "--signal=B:USR1@60")
    job = batch.submit(*options, INTERRUPT="before the first step:WAIT")
    batch.wait_until((batch.path / "once").exists, "the first step")
    cluster.do("scancel", "--batch", "--signal=USR1", job)  # makes step 0 durable
    cluster.start_requeued(job)
    batch.wait_until((batch.path / "once1").exists, "the first step again")
    cluster.wait_for(preempt(cluster, cluster.show(job)["NodeList"]), JobState="COMPLETED")
    shown = cluster.wait_for(job, JobState="PENDING", Priority="0")
    assert shown["Restarts"] == "2"
    assert "gave up: interrupted once before" in batch.told()
    assert f"job {job} is held in the queue" in batch.told()
    (batch.path / "once2").touch()
    cluster.do("scontrol", "release", job)
    cluster.do("scontrol", "update", f"JobId={job}", "StartTime=now+2")
    check_end(cluster, batch, job, reference)


@ONE_TRACKER
def test_the_printed_script(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """What `ckptd slurm-script` prints is a script that Slurm takes, and that comes back."""
    words = (*TRAIN.split(), str(workshop.path), "0")
    printed = subprocess.run(
        [sys.executable, "-m", "ckptd", *PRINT, "--", *words],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    printed = printed.replace("$SLURM_SUBMIT_DIR", str(workshop.path))  # here: of the tests
    _, _, body = printed.replace("exec ckptd launch", f"exec {LAUNCH}").partition("\n")
    batch = Batch(cluster, workshop, body=body)
    job = begun(batch)
    cluster.do("scancel", "--batch", "--signal=USR1", job)
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)


@pytest.mark.nightly
@pytest.mark.parametrize("warned", [True, False])
def test_the_time_limit(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes], warned: bool
) -> None:
    """A job that reaches its time limit is put back into the queue, warned of it or not."""
    options = ["--signal=B:USR1@60"] if warned else []
    batch = training(cluster, workshop)
    job = begun(batch, "--time=5", *options)
    cluster.do("scontrol", "update", f"JobId={job}", f"EndTime=now+{70 if warned else 3}")
    cluster.start_requeued(job)
    cluster.do("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    check_end(cluster, batch, job, reference)
    assert f"asked Slurm to put job {job} back into the queue" in batch.told()
    assert f"stopped ({'SIGUSR1' if warned else 'SIGTERM'})" in batch.told()


@pytest.mark.nightly
def test_preempted_at_the_end_of_the_grace(
    cluster: Cluster, workshop: Workshop, reference: tuple[bytes, bytes]
) -> None:
    """Without --signal a batch process hears nothing until the grace is over."""
    batch = training(cluster, workshop)
    job = begun(batch, "--exclusive", "--partition=graced")
    other = preempt(cluster, cluster.show(job)["NodeList"])
    cluster.wait_for(other, JobState="COMPLETED")
    cluster.start_requeued(job)
    check_end(cluster, batch, job, reference)
    assert "stopped (SIGTERM)" in batch.told()
