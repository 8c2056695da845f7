"""`python -m benchmarks`: a table of what ckptd costs, with its targets.

Every figure is a ratio or a difference of two things that were measured in turn, in one run: on a
machine that others use too, seconds alone say little. Each row gives the median over the pairs and
the middle half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Row:
    """One line of the table: the median, the middle half of the pairs, and what it should be."""

    name: str
    median: float
    low: float
    high: float
    unit: str
    target: float | None

    @classmethod
    def of(cls, name: str, values: Sequence[float], unit: str, target: float | None) -> Row:
        low, median, high = statistics.quantiles(values, n=4)
        return cls(name, median, low, high, unit, target)

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "met" if self.median <= self.target else "MISSED"


class Bench:
    """Runs the benchmarks in a directory of its own."""

    def __init__(self, place: Path, *, quick: bool) -> None:
        self._place = place
        self._quick = quick

    def rows(self) -> Iterator[Row]:
        """All rows, as they come."""
        yield self.loop()
        for workers in (1, 2):
            yield self.loader(workers)
        yield self.resuming()
        yield from self.starting()
        yield self.stall()

    def loop(self) -> Row:
        pairs = self._script("loop", self._repeats(101))
        values = [1e6 * (ours - bare) for ours, bare in pairs]
        return Row.of("an item of job.loop(range(n)), beyond a bare for", values, "µs", 1.0)

    def loader(self, workers: int) -> Row:
        pairs = self._script("loader", self._repeats(21), workers)
        values = [100 * (ours / plain - 1) for ours, plain in pairs]
        name = f"an epoch of a DataLoader with 100 µs samples, {workers} workers: longer by"
        return Row.of(name, values, "%", 2.0)

    def resuming(self) -> Row:
        """Time to the first batch after a resume, at 95 % and at 0 % of an epoch."""
        begin, end = self._interrupted(1), self._interrupted(31_250 * 95 // 100)
        pairs = [(self._resumed(end), self._resumed(begin)) for _ in range(self._repeats(9))]
        values = [100 * (late / early - 1) for late, early in pairs]
        return Row.of("resuming at 95 % of a million samples, beyond at 0 %", values, "%", 10.0)

    def starting(self) -> Iterator[Row]:
        bare = [sys.executable, "-c", "import torch"]
        launched, plain = [], []
        for _ in range(self._repeats(9)):
            shutil.rmtree(self._place / "start", ignore_errors=True)
            launched.append(self._timed([*self._launch("start"), *bare]))
            plain.append(self._timed(bare))
        values = [1e3 * (ours - theirs) for ours, theirs in zip(launched, plain, strict=True)]
        yield Row.of("ckptd launch -- python -c 'import torch', beyond without", values, "ms", None)
        yield Row.of("the supervisor's resident memory", self._resident(), "MiB", 40.0)

    def stall(self) -> Row:
        pairs = self._script("stall", self._repeats(21))
        values = [stalled / copied for stalled, copied in pairs]
        return Row.of("a snapshot of 64 MiB, beside one copy of the bytes", values, "times", None)

    # -------------------------------------------------------------- the small things

    def _repeats(self, many: int) -> int:
        return 3 if self._quick else many

    def _launch(self, name: str) -> list[str]:
        head = [sys.executable, "-m", "ckptd", "launch", "--every", "1e9"]
        return [*head, "--dir", str(self._place / name), "--name", "job", "--"]

    def _script(self, name: str, *arguments: object) -> list[tuple[float, float]]:
        shutil.rmtree(self._place / name, ignore_errors=True)
        out = self._place / "out.json"
        command = [sys.executable, str(SCRIPTS / f"{name}.py"), str(out), *map(str, arguments)]
        self._run([*self._launch(name), *command])
        return [(ours, theirs) for ours, theirs in json.loads(out.read_text())]

    def _interrupted(self, batch: int) -> Path:
        """A run that was interrupted after so many batches."""
        name = f"resume-{batch}"
        self._run([*self._launch(name), *self._resume_command(batch)], expected=75)
        return self._place / name

    def _resumed(self, run: Path) -> float:
        """Resume a copy of it; seconds from the start of the launch to the first batch."""
        copy = self._place / "resumed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        self._run([*self._launch("resumed"), *self._resume_command(int(run.name.split("-")[1]))])
        return float((self._place / "out").read_text())

    def _resume_command(self, batch: int) -> list[str]:
        out = str(self._place / "out")
        return [sys.executable, str(SCRIPTS / "resume.py"), out, str(batch)]

    def _resident(self) -> list[float]:
        """MiB of the supervisor, besides the arenas, at most, while a job is saved and restored."""
        sizes = []
        for _ in range(3):
            shutil.rmtree(self._place / "memory", ignore_errors=True)
            run = str(self._place / "memory" / "job")
            options = ("--memory-tier", "off", "--", sys.executable)
            head = self._launch("memory")[:-1]
            command = [*head, *options, str(SCRIPTS / "resident.py"), run]
            supervisor = subprocess.Popen(command, cwd=self._place, stderr=subprocess.DEVNULL)
            most = 0
            while supervisor.poll() is None:
                most = max(most, _besides_shared(supervisor.pid))
                time.sleep(0.002)
            if supervisor.returncode != 0:
                raise SystemExit(f"{command}: exit code {supervisor.returncode}")
            sizes.append(most / 2**20)
        return sizes

    def _timed(self, command: Sequence[str]) -> float:
        began = time.perf_counter()
        self._run(command)
        return time.perf_counter() - began

    def _run(self, command: Sequence[str], expected: int = 0) -> None:
        done = subprocess.run(
            command,
            cwd=self._place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != expected:
            raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def _besides_shared(pid: int) -> int:
    """Resident bytes of a process, without memory that it shares with others (the arenas)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes.get(key, "0").split()[0]) << 10 for key in ("RssAnon", "RssFile"))


def main() -> None:
    """Measure, and print the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats: shows that it works")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    table = Table(box=None, pad_edge=False)
    for column in ("measured", "median", "middle half", "target", ""):
        table.add_column(column, justify="left" if column in ("measured", "") else "right")
    rows = []
    with tempfile.TemporaryDirectory(prefix="ckptd-bench-") as place:
        for row in Bench(Path(place), quick=args.quick).rows():
            rows.append(row)
            print(f"{row.name}: {row.median:.3g} {row.unit}", file=sys.stderr, flush=True)
    for row in rows:
        half = f"{row.low:.3g} … {row.high:.3g}"
        target = "" if row.target is None else f"≤ {row.target:g} {row.unit}"
        table.add_row(row.name, f"{row.median:.3g} {row.unit}", half, target, row.verdict)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
