"""Real disks in trouble: full, read-only, gone, forbidden, limited. Training goes on, what is
durable stays so, and it is said what did not work, in bytes and with the path."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Workshop
from drive import Drive, missing
from launched import (
    Launched,
    checkpoints,
    logged,
    no_leftovers,  # noqa: F401  # a fixture for every test here
)
from mounts import fill, mount, mounted

from ckptd.host.disk import RealDisk
from ckptd.store import store
from ckptd.supervisor import journal, server
from ckptd.supervisor.journal import Journal
from ckptd.supervisor.run import Run

HEAVY = str(Path(__file__).parent / "heavy_worker.py")
BULK = 1 << 20
ANSWERS_S = 30.0
OFTEN = ("--every", "0.05", "--keep", "2")


def heavy(*options: str) -> tuple[str, ...]:
    """The command of a worker with a state of a mebibyte."""
    return sys.executable, HEAVY, *options


@pytest.fixture
def small(workshop: Workshop) -> Iterator[Workshop]:
    """A workshop whose runs lie on a file system of eight mebibytes."""
    with mounted(workshop.path / "runs", "-t", "tmpfs", "-o", "size=8m", "none"):
        yield workshop


@pytest.fixture(params=["ext4", "xfs"])
def failing(
    request: pytest.FixtureRequest, workshop: Workshop, tmp_path: Path
) -> Iterator[tuple[Workshop, Drive]]:
    """A workshop whose runs lie on a drive that can fail."""
    why = missing(request.param)
    if why is not None:
        pytest.skip(why)
    path = tmp_path / "drive"
    path.mkdir()
    drive = Drive(path, request.param)
    try:
        (workshop.path / "runs").symlink_to(drive.files)
        yield workshop, drive
    finally:
        drive.off()


def run_of(workshop: Workshop) -> Run:
    return Run(workshop.path / "runs" / "job")


def durable(workshop: Workshop) -> list[int]:
    """The steps that were reported durable."""
    return [event["step"] for event in workshop.journal() if event["event"] == "durable"]


def wait_durable(launched: Launched, *, beyond: int = 0) -> int:
    """The newest step that was reported durable, as soon as one beyond a step was."""
    while True:
        found = durable(launched.workshop)
        if found and found[-1] > beyond:
            return found[-1]
        step = launched.wait_for_step()
        launched.wait_for_step(step + 1)
        assert launched.process.poll() is None, launched.told()


def goes_on(launched: Launched) -> None:
    """Training goes on."""
    launched.wait_for_step(launched.wait_for_step() + 5)


def all_verify(workshop: Workshop) -> list[int]:
    """Nothing runs any more: every checkpoint verifies; their steps."""
    path = run_of(workshop).checkpoints
    found = store.listing(RealDisk(), path)
    return sorted(store.verify(RealDisk(), one.path).step for one in found)


def resumes(workshop: Workshop, launched: Launched) -> None:
    """The same line goes on with the newest durable checkpoint, to its end."""
    newest = all_verify(workshop)[-1]
    total = str(launched.steps()[-1] + 10)
    again = Launched(workshop, *heavy("--total", total), options=("--accept-changes",))
    assert again.ends() == 0, again.told()
    assert again.steps() == list(range(newest + 1, int(total) + 1))


# ------------------------------------------------------------------ a full disk


def test_full_and_free_again(small: Workshop) -> None:
    """A disk that fills up costs no step: it is said, with bytes and path; older checkpoints
    stand; when there is room again, the job is durable again."""
    launched = Launched(small, *heavy(), options=OFTEN)
    wait_durable(launched)
    filler = small.path / "runs" / "filler"
    fill(filler)
    told = launched.wait_for("could not make a checkpoint durable")
    assert "No space left on device" in told
    (length,) = re.findall(r"a checkpoint of (\d+) bytes", told)
    assert int(length) > BULK
    assert str(run_of(small).checkpoints) in told
    goes_on(launched)
    stands = checkpoints(small)
    assert stands
    filler.unlink()
    newest = wait_durable(launched, beyond=max(stands[-1], launched.steps()[-1]))
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert all_verify(small)[-1] == launched.steps()[-1] >= newest
    assert durable(small)[-1] == launched.steps()[-1]
    resumes(small, launched)


def test_stopped_on_a_full_disk(small: Workshop) -> None:
    """A stop with the disk full ends with 74 and says which checkpoint stands; it is continued."""
    launched = Launched(small, *heavy(), options=("--every", "0.05", "--keep", "1"))
    wait_durable(launched)
    fill(small.path / "runs" / "filler")
    launched.wait_for("could not make a checkpoint durable")
    assert launched.signal(signal.SIGTERM).ends() == 74, launched.told()
    (stands,) = all_verify(small)
    assert f"The checkpoint of step {stands} stands" in launched.messages[-1]
    (small.path / "runs" / "filler").unlink()
    resumes(small, launched)


def test_started_on_a_full_disk(small: Workshop) -> None:
    """A launch on a full disk ends with 74 and names the file."""
    fill(small.path / "runs" / "filler")
    launched = Launched(small, *heavy(), options=OFTEN)
    assert launched.ends() == 74
    assert "No space left on device" in launched.told()
    assert str(run_of(small).path) in launched.told()


def test_no_event_is_lost_to_a_full_disk(tmp_path: Path) -> None:
    """Of a line of the journal a full disk may take half: what is written afterwards, when there
    is room again, is read all the same."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "none") as small:
        said: list[str] = []
        events = Journal(small / "journal.jsonl", lambda: 0.0, said.append)

        def write(event: str) -> None:
            events.append(events.line(event, {}))

        write("first")
        fill(small / "filler")
        while not said:
            write("while it filled up")
        (small / "filler").unlink()
        write("there is room")
        write("last")
        found = [event["event"] for event in journal.read(small / "journal.jsonl")]
        assert found[-2:] == ["there is room", "last"]
        assert "No space left on device" in said[0]


# ------------------------------------------------------------------ read-only, gone, forbidden


def test_read_only(workshop: Workshop) -> None:
    """Checkpoints on a file system that turns read-only: said, and durable again afterwards."""
    (workshop.path / "runs" / "job").mkdir(parents=True)
    path = run_of(workshop).checkpoints
    with mounted(path, "-t", "tmpfs", "none"):
        launched = Launched(workshop, *heavy(), options=OFTEN)
        wait_durable(launched)
        command = ["mount", "-o", "remount,ro", str(path)]
        while subprocess.run(command, capture_output=True, check=False).returncode:
            goes_on(launched)  # busy: a checkpoint was just being written
        told = launched.wait_for("could not make a checkpoint durable")
        assert "Read-only file system" in told
        goes_on(launched)
        stands = checkpoints(workshop)
        mount("-o", "remount,rw", str(path))
        wait_durable(launched, beyond=stands[-1])
        assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
        resumes(workshop, launched)


def test_removed(workshop: Workshop) -> None:
    """Somebody removes the directory of the checkpoints: the next one is durable all the same."""
    launched = Launched(workshop, *heavy(), options=OFTEN)
    wait_durable(launched)
    taken = workshop.path / "taken"
    run_of(workshop).checkpoints.rename(taken)
    wait_durable(launched, beyond=launched.wait_for_step())
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert checkpoints(workshop)[-1] == launched.steps()[-1]
    shutil.rmtree(taken)
    resumes(workshop, launched)


def test_forbidden(workshop: Workshop) -> None:
    """The permission to write is lost: said; with the permission, durable again."""
    if os.geteuid() == 0:  # root may write anywhere, unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("root without `setpriv` can't be forbidden anything")
        powerless = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
        workshop = Workshop(workshop.path, powerless)
    launched = Launched(workshop, *heavy(), options=OFTEN)
    wait_durable(launched)
    path = run_of(workshop).checkpoints
    path.chmod(0o555)
    told = launched.wait_for("could not make a checkpoint durable")
    assert "Permission denied" in told
    assert str(path) in told
    goes_on(launched)
    stands = checkpoints(workshop)
    path.chmod(0o755)
    wait_durable(launched, beyond=stands[-1])
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    resumes(workshop, launched)


def test_file_size_limit(workshop: Workshop) -> None:
    """A limit on the size of files that a checkpoint does not fit in: said; 74 at the stop."""
    if shutil.which("prlimit") is None:
        pytest.skip("there is no `prlimit` here")
    limited = Workshop(workshop.path, ("prlimit", f"--fsize={BULK // 2}:unlimited"))
    launched = Launched(limited, *heavy(), options=OFTEN)
    told = launched.wait_for("could not make a checkpoint durable")
    assert "File too large" in told
    assert "bulk.bin" in told
    goes_on(launched)
    assert launched.signal(signal.SIGTERM).ends() == 74, launched.told()
    assert "There is no checkpoint yet" in launched.messages[-1]
    assert checkpoints(workshop) == []


# ------------------------------------------------------------------ a disk that fails


def test_writes_fail(failing: tuple[Workshop, Drive]) -> None:
    """A drive that takes no write any more: training goes on, 74 at the stop, and the checkpoint
    that is said to stand does, after the drive has been switched off and on."""
    workshop, drive = failing
    launched = Launched(workshop, *heavy(), options=OFTEN)
    wait_durable(launched)
    drive.fail("write", "flush")
    told = launched.wait_for("could not make a checkpoint durable")
    # The file system may have seen it first, and have turned itself read-only.
    assert "Input/output error" in told or "Read-only file system" in told
    assert str(run_of(workshop).path) in told
    goes_on(launched)
    assert launched.signal(signal.SIGTERM).ends() == 74, launched.told()
    (said,) = (line for line in launched.messages if "stopped (SIGTERM)" in line)
    stands = int(said.rpartition("The checkpoint of step ")[2].split()[0])
    drive.off()
    drive.on()
    assert stands in all_verify(workshop)
    resumes(workshop, launched)


def test_finished_on_a_failing_disk(failing: tuple[Workshop, Drive]) -> None:
    """A job that comes to its end on a disk that takes nothing any more has finished: 0."""
    workshop, drive = failing
    gate = workshop.path / "gate"
    launched = Launched(workshop, *heavy("--total", "100", "--gate", str(gate)), options=OFTEN)
    launched.wait_for("step 3")
    drive.fail("write", "flush")
    gate.touch()
    assert launched.ends() == 0, launched.told()
    assert launched.steps() == list(range(1, 101))


def test_reads_fail(failing: tuple[Workshop, Drive]) -> None:
    """A checkpoint that can't be read is not a damaged one: the launch ends with 74, says which
    file it was, and sets nothing aside; when the drive works again, the job goes on."""
    workshop, drive = failing
    launched = Launched(workshop, *heavy(), options=OFTEN)
    wait_durable(launched)
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    drive.off()
    drive.on()  # nothing is in the system's memory any more
    for path in workshop.path.glob("runs/job/**/*"):
        if path.is_file() and path.name != "bulk.bin":
            path.read_bytes()
    drive.fail("read")
    again = Launched(workshop, *heavy(), options=OFTEN)
    assert again.ends() == 74, again.told()
    assert "Input/output error" in again.told()
    assert str(run_of(workshop).path) in again.told()
    drive.off()
    drive.on()
    resumes(workshop, launched)


# ------------------------------------------------------------------ a disk that hangs


def test_hangs(failing: tuple[Workshop, Drive]) -> None:
    """A drive that does not answer for a while: training goes on, the supervisor answers and hears
    a stop, which ends in order when the drive answers again; nothing of the journal is missing."""
    workshop, drive = failing
    launched = Launched(workshop, *heavy(), options=(*OFTEN, "--grace", "200"))
    stands = wait_durable(launched)
    holder = run_of(workshop).supervisor()
    assert holder is not None
    drive.hang()
    try:
        goes_on(launched)
        assert server.ask(holder.socket, "status", ANSWERS_S).facts["state"] == "attached"
        launched.signal(signal.SIGTERM)  # the supervisor wants to write that down
        launched.wait_for("SIGTERM: saving the job")
        assert server.ask(holder.socket, "status", ANSWERS_S).facts["state"] == "flushing"
    finally:
        drive.mend()
    assert launched.ends() == 75, launched.told()
    assert checkpoints(workshop)[-1] > stands
    assert "asked to stop" in {event["event"] for event in workshop.journal()}
    assert logged(workshop) == launched.steps()
    resumes(workshop, launched)
