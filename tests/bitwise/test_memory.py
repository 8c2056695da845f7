"""A job whose worker was killed goes on from memory: the disk is not asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, Workshop, limited

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the plain script writes."""
    path = tmp_path_factory.mktemp("plain")
    Workshop(path).plain(sys.executable, str(SCRIPTS / "memory.py"), "out", "none")
    return (path / "out").read_text()


def run(workshop: Workshop, *options: str, through: tuple[str, ...] = ()) -> list[dict]:
    """Run the script, which kills itself twice; the starts that the journal knows."""
    checkpoints = workshop.path / "runs" / "job" / "checkpoints"
    argv = str(SCRIPTS / "memory.py"), str(workshop.path / "out"), str(checkpoints)
    done = workshop.launch(*(through or (sys.executable,)), *argv, options=options)
    assert done.returncode == 0, done.stderr + done.stdout
    assert Path(workshop.path / "out.3").exists()
    assert Path(workshop.path / "out.9").exists()
    return [event for event in workshop.journal() if event["event"] == "started"]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")


@pytest.mark.parametrize("through", [(), TORCHRUN], ids=["python", "torchrun"])
def test_from_memory(workshop: Workshop, expected: str, through: tuple[str, ...]) -> None:
    """Killed with no checkpoint left on the disk, and killed when half of the next snapshot was
    copied: it goes on from the newest whole one, bit for bit."""
    starts = run(workshop, through=through)
    assert [(one["step"], one["of"]) for one in starts] == [
        (None, "disk"),
        (4, "memory"),
        (10, "memory"),
    ]
    assert (workshop.path / "out").read_text() == expected


def test_memory_tier_off(workshop: Workshop, expected: str) -> None:
    """Without it, the disk is what there is: here nothing, then the checkpoint of step 10."""
    starts = run(workshop, "--memory-tier", "off")
    assert [(one["step"], one["of"]) for one in starts] == [
        (None, "disk"),
        (None, "disk"),
        (10, "disk"),
    ]
    assert (workshop.path / "out").read_text() == expected


def test_cadence(workshop: Workshop, tmp_path: Path) -> None:
    """Nobody asks for a checkpoint: snapshots are taken as often as they may cost, none is written
    while the job runs, and a killed worker loses the one step since."""
    script = str(SCRIPTS / "cadence.py")
    workshop.plain(sys.executable, script, str(tmp_path / "plain"))
    options = ("--overhead", "1")
    done = workshop.launch(sys.executable, script, str(tmp_path / "out"), options=options)
    assert done.returncode == 0, done.stderr + done.stdout
    events = workshop.journal()
    starts = [(one["step"], one["of"]) for one in events if one["event"] == "started"]
    assert starts == [(None, "disk"), (12, "memory")]
    durable = [one["step"] for one in events if one["event"] == "durable"]
    assert durable == [12], "made durable when the worker had died, and not before"
    assert (tmp_path / "out").read_text() == (tmp_path / "plain").read_text()


def test_no_memory_for_a_snapshot(workshop: Workshop, tmp_path: Path) -> None:
    """A control group with no room for the state a second time: the snapshots go through a file,
    each is durable, nobody is killed for want of memory, and it continues bit for bit."""
    script = str(SCRIPTS / "short_of_memory.py")
    workshop.plain(sys.executable, script, str(tmp_path / "plain"))
    with limited(640 << 20) as prefix:
        within = Workshop(workshop.path, prefix)
        done = within.launch(sys.executable, script, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "a snapshot needs 256 MiB of memory" in done.stderr
    assert "it goes through a file in" in done.stderr
    events = workshop.journal()
    ends = [(one["code"], one["step"]) for one in events if one["event"] == "exited"]
    assert ends == [(-9, 2), (0, 4)], "killed by itself, and by nobody else"
    assert [one["step"] for one in events if one["event"] == "durable"] == [1, 2, 3, 4]
    assert (tmp_path / "out").read_text() == (tmp_path / "plain").read_text()
