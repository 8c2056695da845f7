"""What is not trained is written once, and comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, Workshop
from safetensors.torch import load_file

pytestmark = pytest.mark.real

SCRIPT = str(SCRIPTS / "finetune.py")
EMBEDDING = str(SCRIPTS / "embedding.py")


def written(checkpoints: Path) -> list[float]:
    """Which share of the bytes of each checkpoint was written for it."""
    known: set[int] = set()
    shares = []
    for checkpoint in sorted(checkpoints.iterdir()):
        files = {path: path.stat() for path in checkpoint.iterdir()}
        new = sum(one.st_size for one in files.values() if one.st_ino not in known)
        known |= {one.st_ino for one in files.values()}
        shares.append(new / sum(one.st_size for one in files.values()))
    return shares


def test_fine_tuning_writes_what_it_trains(workshop: Workshop) -> None:
    """With 99 % of the weights frozen, a checkpoint costs at most 3 % of the bytes."""
    run, weights = workshop.path / "runs" / "job", workshop.path / "weights.pt"
    argv = sys.executable, SCRIPT, str(run / "checkpoints"), str(weights)
    done = workshop.launch(*argv, options=("--keep", "9"))
    assert done.returncode == 0, done.stderr
    shares = written(run / "checkpoints")
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


def with_embedding(workshop: Workshop, late: int, *stops: int) -> list[float]:
    """Run embedding.py, interrupted and launched again: bit for bit what the plain script makes.
    Which share of each checkpoint was written for it."""
    checkpoints = workshop.path / "runs" / "job" / "checkpoints"
    argv = str(checkpoints), str(late)
    workshop.plain(sys.executable, EMBEDDING, "plain.pt", *argv)
    for stop in (*stops, -1):
        command = sys.executable, EMBEDDING, "out.pt", *argv
        done = workshop.launch(*command, options=("--keep", "99"), STOP=str(stop))
        assert done.returncode == (0 if stop < 0 else 75), done.stderr
    plain, out = (torch.load(workshop.path / name) for name in ("plain.pt", "out.pt"))
    assert plain.keys() == out.keys()
    for key in plain:
        assert torch.equal(plain[key].view(torch.int32), out[key].view(torch.int32)), key
    return written(checkpoints)


def test_an_embedding_that_nobody_trains(workshop: Workshop) -> None:
    """It is left out of the optimizer, though `requires_grad` is set: 90 % of the bytes, which are
    written no more as soon as they were seen to stay the same, also after an interruption."""
    shares = with_embedding(workshop, 99, 5)
    assert max(shares[3:]) <= 0.2, shares
    assert len(shares) == 12


def test_an_embedding_that_is_trained_later(workshop: Workshop) -> None:
    """It is written again from then on, and what comes back is right: interrupted before and
    after."""
    shares = with_embedding(workshop, 7, 5, 8)
    assert max(shares[3:7]) <= 0.2, shares
    assert min(shares[8:]) >= 0.8, shares
