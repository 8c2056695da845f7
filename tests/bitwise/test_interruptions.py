"""An interrupted job ends bitwise as one that was never interrupted, and as the plain script.

Every case starts real processes. The script interrupts itself (tests/scripts/interruption.py) at an
exact moment, and is continued in a new process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, Workshop
from safetensors import safe_open

pytestmark = pytest.mark.real

SIGNALS = ("TERM", "USR1", "KILL worker", "KILL supervisor")
MOMENTS = ("before the first step", "mid-epoch", "between epochs", "evaluation", "the flush")
WORKERS = (0, 2)


def bits(path: Path) -> dict[str, bytes]:
    """Every tensor of a result as its bytes, by name."""
    import torch

    with safe_open(path, framework="pt") as result:
        return {
            name: result.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for name in result.keys()  # noqa: SIM118  # not a dict
        }


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict, bytes]]:
    """The plain script's result and metrics, by number of loader workers."""
    found = {}
    for workers in WORKERS:
        path = tmp_path_factory.mktemp(f"plain{workers}")
        Workshop(path).plain(sys.executable, str(SCRIPTS / "plain.py"), str(path), str(workers))
        found[workers] = bits(path / "result.safetensors"), (path / "metrics.csv").read_bytes()
    return found


def check(path: Path, reference: tuple[dict[str, bytes], bytes]) -> None:
    """Compare weights, optimizer state, every loss, generators and the metrics file."""
    expected, metrics = reference
    found = bits(path / "result.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert (path / "metrics.csv").read_bytes() == metrics


@pytest.mark.parametrize("workers", WORKERS)
def test_without_interruption(workshop: Workshop, references: dict, workers: int) -> None:
    """Under `ckptd launch`, never interrupted, the script computes what it computes plainly."""
    done = workshop.launch(
        sys.executable, str(SCRIPTS / "train.py"), str(workshop.path), str(workers)
    )
    assert done.returncode == 0, done.stderr
    check(workshop.path, references[workers])


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_interrupted(
    workshop: Workshop, references: dict, signal: str, moment: str, workers: int
) -> None:
    """Interrupted once by this signal at this moment, and continued, the result is the same."""
    argv = sys.executable, str(SCRIPTS / "train.py"), str(workshop.path), str(workers)
    once = workshop.path / "once"
    environment = {"INTERRUPT": f"{moment}:{signal}", "INTERRUPT_ONCE": str(once)}
    done = workshop.launch(*argv, **environment)
    assert once.exists(), f"the moment did not come: {done.stderr}"
    expected = {"KILL worker": (0, 75), "KILL supervisor": (-9,)}.get(signal, (75,))
    assert done.returncode in expected, done.stdout + done.stderr
    if done.returncode != 0:
        again = workshop.launch(*argv, **environment)
        assert again.returncode == 0, again.stdout + again.stderr
    check(workshop.path, references[workers])
    if moment != "before the first step":
        assert any(event["event"] == "restored" for event in workshop.journal())
