"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOUND_S

pytestmark = [pytest.mark.real, pytest.mark.nightly]


def test_every_row_has_figures(tmp_path: Path) -> None:
    """The documented command prints all rows; how large they are is no test's matter."""
    report = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(report)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())
    for words in ("job.loop", "1 workers", "2 workers", "95 %", "launch", "resident", "snapshot"):
        assert any(words in row["name"] for row in rows), words
    for row in rows:
        assert row["low"] <= row["median"] <= row["high"]
        assert all(math.isfinite(row[key]) for key in ("low", "median", "high"))
