"""However many files and objects a job has, its state is saved and comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, Workshop

pytestmark = pytest.mark.real

SCRIPT = str(SCRIPTS / "many.py")


def contents(directory: Path) -> dict[str, bytes]:
    """All files in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plain script has written."""
    path = tmp_path_factory.mktemp("plain")
    Workshop(path).plain(sys.executable, SCRIPT, "out", "outputs")
    return path


def is_that_of(workshop: Workshop, plain: Path) -> None:
    """What was written is what the plain script writes."""
    assert (workshop.path / "out").read_text() == (plain / "out").read_text()
    assert contents(workshop.path / "outputs") == contents(plain / "outputs")


def test_stopped(workshop: Workshop, plain: Path) -> None:
    """2,500 outputs with long names and 900 tracked tensors: a stop is 75, and it continues bit
    for bit; the list of what a snapshot holds would fill several packets."""
    argv = sys.executable, SCRIPT, "out", "outputs"
    stopped = workshop.launch(*argv, STRIKE="2500", SIGNAL="TERM")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    done = workshop.launch(*argv)
    assert done.returncode == 0, done.stderr[-3000:]
    (restored,) = [event for event in workshop.journal() if event["event"] == "restored"]
    assert restored["step"] == 2500
    is_that_of(workshop, plain)


def test_killed(workshop: Workshop, plain: Path) -> None:
    """The same when it goes on from the snapshot in memory."""
    argv = sys.executable, SCRIPT, "out", "outputs"
    done = workshop.launch(*argv, STRIKE="2500", SIGNAL="KILL")
    assert done.returncode == 0, done.stderr[-3000:]
    starts = [event for event in workshop.journal() if event["event"] == "started"]
    assert [(one["step"], one["of"]) for one in starts] == [(None, "disk"), (2500, "memory")]
    is_that_of(workshop, plain)
