"""How much memory a job may still use, under limits of both versions of control groups."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import limited

from ckptd.host import memory

LIMIT, FILE = 512 << 20, 384 << 20

MEASURE = f"""
from pathlib import Path
from ckptd.host import memory
before = memory.available()
with Path("cached").open("wb") as file:
    for _ in range({FILE >> 20}):
        file.write(b"x" * (1 << 20))
cached = memory.available()
kept = b"x" * (256 << 20)
print(before, cached, memory.available())
"""


def test_a_real_limit(tmp_path: Path) -> None:
    """What the job holds counts; files that are only cached, which fill any limit, do not."""
    with limited(LIMIT) as through:
        done = subprocess.run(
            [*through, sys.executable, "-c", MEASURE],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
    before, cached, held = map(int, done.stdout.split())
    assert before < LIMIT
    assert cached > LIMIT - FILE, "the cache of a file is taken for memory in use"
    assert held <= cached - (200 << 20), "what is held is not seen"


def test_each_group_above_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2: the least that is left under any limit above, cached files not counted."""
    version = replace(memory._VERSION_2, root=tmp_path)
    job, step = tmp_path / "job", tmp_path / "job" / "step"
    step.mkdir(parents=True)
    groups = {
        tmp_path: ("max", 7_000_000, 0, 0),
        job: ("5000000", 4_800_000, 1_000_000, 500_000),
        step: ("max", 100, 0, 0),
    }
    for group, (limit, used, inactive, active) in groups.items():
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        stat = f"anon 7\nfile 9\ninactive_anon 3\ninactive_file {inactive}\nactive_file {active}\n"
        (group / "memory.stat").write_text(stat)
    monkeypatch.setattr(memory, "_groups", lambda: iter([(step, version)]))
    assert memory.available() == 5_000_000 - (4_800_000 - 1_500_000)
    (job / "memory.current").write_text("9000000\n")
    assert memory.available() == 0
    (job / "memory.max").write_text("max\n")
    assert memory.available() > psutil.virtual_memory().total // 100
