"""What does not fit is an error that names the object, what was found and what was expected."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, Workshop

pytestmark = pytest.mark.real

ARGV = sys.executable, str(SCRIPTS / "variants.py")


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run that was interrupted in the fourth item of its first epoch."""
    workshop = Workshop(tmp_path_factory.mktemp("interrupted"))
    done = workshop.launch(*ARGV, STRIKE="1")
    assert done.returncode == 75, done.stderr
    return workshop.path


def again(workshop: Workshop, interrupted: Path, variant: str, *options: str):
    """Launch the script's variant on a copy of the interrupted run."""
    shutil.copytree(interrupted, workshop.path, dirs_exist_ok=True)
    options = ("--accept-changes", "--max-restarts", "0", *options)
    return workshop.launch(*ARGV, options=options, VARIANT=variant)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("shape", ("`model`", "`body.weight`", "float32 [3, 4]", "float32 [5, 4]")),
        ("dtype", ("`model`", "`body.weight`", "float32 [3, 4]", "float64 [3, 4]")),
        ("missing", ("`model`", "not in the model: `body.weight`", "`other.weight`")),
        ("unexpected", ("`model`", "not in the checkpoint: `more.weight`")),
        ("optimizer", ("`optimizer`", "AdamW", "SGD")),
        ("other kind", ("`history`", "a list", "a dict")),
        ("new name", ("`ema`", "holds no such object", "history, model, optimizer")),
        ("length", ("variants.py:", "8 items", "9 items", "4 of them done")),
        ("loop kind", ("variants.py:", "sequence", "DataLoader")),
        ("missed", ("variants.py:", "without coming to it again", "job.vars")),
        ("more loops", ("variants.py:",)),
    ],
)
def test_what_does_not_fit(
    workshop: Workshop, interrupted: Path, variant: str, words: tuple[str, ...]
) -> None:
    """The job is given up on at once (70), the error is clear, and the checkpoint is untouched."""
    done = again(workshop, interrupted, variant, "--max-restarts", "3")
    assert done.returncode == 70, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert "Traceback" in done.stdout
    before, after = (contents(p / "runs/job/checkpoints") for p in (interrupted, workshop.path))
    assert before == after
    events = [event["event"] for event in workshop.journal()]
    assert events.count("started") == 2  # once before, once now: trying again would not help


def test_a_script_that_ends_before_its_resume_point(workshop: Workshop, interrupted: Path) -> None:
    """Exit status 0 without having come back to the loop is a failure and not a finished run."""
    done = again(workshop, interrupted, "finished early")
    assert done.returncode == 70
    assert "without coming back to the loop at variants.py:" in done.stdout


def test_a_script_that_exits_early_is_tried_again(workshop: Workshop, interrupted: Path) -> None:
    """A failure of the script's own before the resume point is an ordinary failure."""
    done = again(workshop, interrupted, "exit", "--max-restarts", "2")
    assert done.returncode == 70
    assert [event["event"] for event in workshop.journal()].count("started") == 4


def test_an_exception_behind_a_shell(workshop: Workshop) -> None:
    """A shell that hides the script's exit status does not make an exception a finished run."""
    script = " ".join(ARGV) + "; true"
    once = "--max-restarts", "0"
    done = workshop.launch("sh", "-c", script, options=once, VARIANT="exception")
    assert done.returncode == 70, done.stderr


def test_a_shorter_output_file(workshop: Workshop, interrupted: Path) -> None:
    """An output file that lost what the checkpoint counts on is named, with both lengths."""
    shutil.copytree(interrupted, workshop.path, dirs_exist_ok=True)
    state = next((workshop.path / "runs/job/checkpoints").iterdir()) / "state.json"
    assert str(interrupted / "out.txt") in state.read_text()
    kept = (interrupted / "out.txt").read_bytes()
    try:
        (interrupted / "out.txt").write_bytes(kept[:3])
        options = ("--accept-changes", "--max-restarts", "0")
        done = Workshop(interrupted).launch(*ARGV, options=options)
        assert done.returncode == 70
        assert "out.txt has 3 bytes; it had 16 bytes" in done.stderr
    finally:
        (interrupted / "out.txt").write_bytes(kept)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint(workshop: Workshop, interrupted: Path, damage: str) -> None:
    """A damaged checkpoint is set aside and named; with no older one the job starts over."""
    shutil.copytree(interrupted, workshop.path, dirs_exist_ok=True)
    (checkpoint,) = (workshop.path / "runs/job/checkpoints").iterdir()
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    if damage == "remove":
        weights.unlink()
    else:
        weights.write_bytes(content if damage == "flip" else content[:-1])
    done = workshop.launch(*ARGV, options=("--accept-changes",))
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stderr
    assert f"{checkpoint.name}.damaged" in done.stderr
    assert checkpoint.with_name(f"{checkpoint.name}.damaged").is_dir()
    assert any(event["event"] == "set aside" for event in workshop.journal())


def test_weights_load_without_ckptd(interrupted: Path) -> None:
    """safetensors alone loads the weights under the model's own key names."""
    from safetensors.torch import load_file
    from torch import nn

    (checkpoint,) = (interrupted / "runs/job/checkpoints").iterdir()
    model = nn.ModuleDict({"body": nn.Linear(4, 3)})
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
