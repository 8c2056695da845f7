"""`ckptd drill` finds nothing in a script that is right, and names what is wrong in the others."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BOUND_S, SCRIPTS, Workshop

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.real

#: Script -> words that its report must have, the culprit's name first.
CULPRITS = {
    "local_counter": ("`best_acc` in main() was", "is 0.0 after resuming", "job.vars.best_acc"),
    "untracked_generator": ("`noise` in main() (Generator)", "ckptd.attach(noise=noise)"),
    "worker_generator": ("Not carried: `Noise.generator`", "ckptd.track"),
    "untracked_ema": ("`ema` in main() (AveragedModel)", "ckptd.attach(ema=ema)"),
    "second_optimizer": ("`critic_optimizer` in main() (Adam)",),
    "time_seed": ("not deterministic", "`numpy.random` stream: seeded by the time"),
    "set_order": ("not deterministic", "step 0", "`model` differs"),
    "appended_metrics": ("the file `metrics.csv` differs", "job.open('metrics.csv')"),
    "scheduler_left_out": ("`scheduler` in main() (CosineAnnealingLR)",),
    "restarted_count": ("enumerate(job.loop(…)) at restarted_count.py:19", "job.enumerate"),
    "loss_after_loop": ("`loss` in main() was", "UnboundLocalError"),
    "rebound_history": ("`history` in main() is another object", "in place"),
}


@pytest.fixture
def place() -> Iterator[Path]:
    """Where drills put their runs: a short path, since loaders' workers make sockets in there."""
    with tempfile.TemporaryDirectory(prefix="d-") as path:
        yield Path(path)


def drill(
    workshop: Workshop, place: Path, *argv: str, options: tuple[str, ...] = ()
) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run a drill; what it printed, and its JSON."""
    report = workshop.path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "ckptd", "drill", "--json", str(report), *options, "--", *argv],
        cwd=workshop.path,
        env=workshop.environment(TMPDIR=str(place), COLUMNS="100"),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    return done, json.loads(report.read_text()) if report.exists() else {}


#: Some are much like another one: these are for the night.
ALIKE = (
    *("untracked_ema", "scheduler_left_out", "loss_after_loop", "set_order", "restarted_count"),
    "second_optimizer",
)
BROKEN = [
    pytest.param(path.stem, marks=[pytest.mark.nightly] if path.stem in ALIKE else [])
    for path in sorted(EXAMPLES.glob("broken/*.py"))
]


@pytest.mark.parametrize("script", BROKEN)
def test_broken(workshop: Workshop, place: Path, script: str) -> None:
    """Of each broken example the drill says that it is, and names the culprit."""
    argv = sys.executable, str(EXAMPLES / "broken" / f"{script}.py")
    done, report = drill(workshop, place, *argv, options=("--interrupts", "2"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert not report["equal"]
    findings = "\n".join(report["findings"])
    for words in CULPRITS[script]:
        assert words in findings
    assert "NOT equal" in done.stdout


def test_mended_by_track(workshop: Workshop, place: Path) -> None:
    """`ckptd.track` where a generator is defined carries it through the loader's workers."""
    source = (EXAMPLES / "broken" / "worker_generator.py").read_text()
    line = "    generator = np.random.default_rng(1)\n"
    assert line in source
    mended = source.replace(line, f"{line}\n\nckptd.track(noise=Noise.generator)\n")
    (workshop.path / "mended.py").write_text(mended)
    done, report = drill(workshop, place, sys.executable, "mended.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["equal"]


def test_all_equal(workshop: Workshop, place: Path) -> None:
    """The example, interrupted five times in five ways, is all equal; nothing is left behind."""
    argv = "--epochs", "2", "--samples", "160", "--workers", "1"
    options = "--interrupts", "5", "--with", "TERM,KILL,USR1,ORPHAN,INT"
    script = str(EXAMPLES / "charlm.py")
    done, report = drill(workshop, place, sys.executable, script, *argv, options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["equal"]
    assert report["findings"] == []
    struck = [strike["how"] for strike in report["strikes"] if strike["how"] != "CHECKPOINT"]
    assert struck == ["TERM", "KILL", "USR1", "ORPHAN", "INT"]
    assert all(step is None for step in report["components"].values())
    assert {"object:`model`", "stream:torch stream", "logged:loss"} <= report["components"].keys()
    assert any("worker 0's numpy stream" in name for name in report["components"])
    assert [path.name for path in workshop.path.iterdir()] == ["report.json"]
    assert list(place.glob("ckptd-drill-*")) == []


def test_at_steps(workshop: Workshop, place: Path) -> None:
    """--at interrupts at those steps; a step that the script does not have is refused."""
    argv = sys.executable, str(EXAMPLES / "broken" / "scheduler_left_out.py")
    done, report = drill(workshop, place, *argv, options=("--at", "5", "--with", "TERM"))
    assert done.returncode == 1, done.stderr
    assert [(strike["how"], strike["step"]) for strike in report["strikes"]] == [("TERM", 5)]
    assert report["first"]["step"] == 6
    assert "object:`optimizer`" in report["first"]["names"]
    assert "object:`model`" in report["first"]["equal"]
    refused, _ = drill(workshop, place, *argv, options=("--at", "500"))
    assert refused.returncode == 64
    assert "only 0 to 24" in refused.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise SystemExit(3)", "fails without any interruption"),
        ("print('no job here')", "never came by a safe point"),
    ],
)
def test_nothing_to_drill(workshop: Workshop, place: Path, source: str, words: str) -> None:
    """A script that fails by itself, or attaches no job, is refused with what it printed."""
    done, report = drill(workshop, place, sys.executable, "-c", source)
    assert done.returncode == 70, done.stdout
    assert words in done.stderr
    assert report == {}


def test_recording_changes_nothing(workshop: Workshop, place: Path) -> None:
    """What a drilled run computes is what the plain script computes."""
    workshop.plain(sys.executable, str(SCRIPTS / "plain.py"), str(workshop.path), "2")
    expected = (workshop.path / "metrics.csv").read_bytes()
    (workshop.path / "metrics.csv").unlink()
    (workshop.path / "result.safetensors").rename(workshop.path / "plain.safetensors")
    script = str(SCRIPTS / "train.py")
    options = "--interrupts", "2", "--keep"
    done, _ = drill(workshop, place, sys.executable, script, ".", "2", options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = place.glob("ckptd-drill-*")
    for run in ("undisturbed", "interrupted"):
        work = kept / run / "work"
        assert (work / "metrics.csv").read_bytes() == expected
        result = (work / "result.safetensors").read_bytes()
        assert result == (workshop.path / "plain.safetensors").read_bytes()
