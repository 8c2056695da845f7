"""A run's directory: where it is, what is kept of an old one, what a crash may leave in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import BOUND_S, Workshop

FAILS = sys.executable, "-c", "raise SystemExit(1)"
ONCE = "--max-restarts", "0"


def test_fresh_keeps_the_old_run(workshop: Workshop) -> None:
    """--fresh starts over; the old directory is renamed, and said."""
    workshop.launch("echo", "one")
    fresh = workshop.launch("echo", "two", options=("--fresh",))
    assert (fresh.returncode, fresh.stdout) == (0, "two\n")
    assert (workshop.path / "runs/job.old-1/log").read_text() == "one\n"
    assert "job.old-1" in fresh.stderr
    numbers = [
        max(path.name for path in (workshop.path / "runs" / name / "attempts").iterdir())
        for name in ("job.old-1", "job")
    ]
    assert numbers == sorted({*numbers}), "an old copy elsewhere would take the new run for its own"


def test_a_torn_journal_is_read(workshop: Workshop) -> None:
    """A line that a crash tore is passed over, and the next event starts a line of its own."""
    workshop.launch(*FAILS, options=ONCE)
    journal = workshop.path / "runs/job/journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"t": 17, "ev')
    workshop.launch(*FAILS, options=ONCE)
    assert [event["event"] for event in workshop.journal()].count("started") == 2


def test_the_directory_may_be_anywhere(workshop: Workshop, tmp_path: Path) -> None:
    """$CKPTD_DIR names the directory of runs; a deep path is no problem for the socket."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    done = subprocess.run(
        [sys.executable, "-m", "ckptd", "launch", "--", "echo", "x"],
        env=workshop.environment(CKPTD_DIR=str(deep)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (deep / "echo/log").read_text() == "x\n"
