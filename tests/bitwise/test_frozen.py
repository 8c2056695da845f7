"""What is not trained is written once, and comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import Workshop
from safetensors.torch import load_file

pytestmark = pytest.mark.real

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "finetune.py")


def test_fine_tuning_writes_what_it_trains(workshop: Workshop) -> None:
    """With 99 % of the weights frozen, a checkpoint costs at most 3 % of the bytes."""
    run, weights = workshop.path / "runs" / "job", workshop.path / "weights.pt"
    argv = sys.executable, SCRIPT, str(run / "checkpoints"), str(weights)
    done = workshop.launch(*argv, options=("--keep", "9"))
    assert done.returncode == 0, done.stderr
    known: set[int] = set()
    shares = []
    for checkpoint in sorted((run / "checkpoints").iterdir()):
        files = {path: path.stat() for path in checkpoint.iterdir()}
        new = sum(one.st_size for one in files.values() if one.st_ino not in known)
        known |= {one.st_ino for one in files.values()}
        shares.append(new / sum(one.st_size for one in files.values()))
    assert len(shares) >= 5
    assert shares[:2] == [1.0, 1.0]  # two copies, so that damage to one leaves the other
    assert max(shares[2:]) <= 0.03, shares


def test_weights_load_without_ckptd(workshop: Workshop) -> None:
    """Each checkpoint by itself holds all weights, for plain safetensors."""
    run, weights = workshop.path / "runs" / "job", workshop.path / "weights.pt"
    argv = sys.executable, SCRIPT, str(run / "checkpoints"), str(weights)
    done = workshop.launch(*argv, options=("--keep", "1"))
    assert done.returncode == 0, done.stderr
    expected = torch.load(weights)
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = {}
    for path in checkpoint.glob("model*.safetensors"):
        if path.name in ("model.safetensors", "model.frozen.safetensors"):
            state |= load_file(path)
    assert state.keys() == expected.keys()
    assert torch.equal(state["0.weight"].view(torch.int32), expected["0.weight"].view(torch.int32))
