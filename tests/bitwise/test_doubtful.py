"""A checkpoint that leads to the same crash again and again is left out once, and kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, Workshop

pytestmark = pytest.mark.real


def test_the_one_before_is_tried(workshop: Workshop, tmp_path: Path) -> None:
    """Four crashes at step 15, three of them from the checkpoint of step 14: from step 8 it gets
    past, and ends as the plain script does."""
    script, checkpoints = str(SCRIPTS / "doubtful.py"), workshop.path / "runs/job/checkpoints"
    workshop.plain(sys.executable, script, str(tmp_path / "plain"), "none")
    options = ("--memory-tier", "off", "--max-restarts", "3")
    argv = (sys.executable, script, str(tmp_path / "out"), str(checkpoints))
    done = workshop.launch(*argv, options=options)
    assert done.returncode == 0, done.stderr + done.stdout
    events = workshop.journal()
    starts = [one["step"] for one in events if one["event"] == "started"]
    assert starts == [None, 14, 14, 14, 8]
    assert [one["step"] for one in events if one["event"] == "suspected"] == [14]
    assert "the checkpoint of step 14 is suspected" in done.stderr
    assert (checkpoints / "000000014").is_dir(), "it is kept"
    assert (tmp_path / "out").read_text() == (tmp_path / "plain").read_text()
