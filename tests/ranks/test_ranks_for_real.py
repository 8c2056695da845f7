"""Several ranks under torchrun: whatever happens to them, they end as if nothing had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Workshop
from launched import Launched, checkpoints, no_leftovers  # noqa: F401  # a fixture for every test

pytestmark = pytest.mark.real

SCRIPT = str(Path(__file__).parents[1] / "scripts/ranks.py")
#: From three ranks on the order of the reduction decides about bits.
RANKS = 3


def torchrun(*arguments: str, ranks: int = RANKS) -> tuple[str, ...]:
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return (*run, f"--nproc-per-node={ranks}", SCRIPT, *arguments)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the script comes to without ckptd."""
    workshop = Workshop(tmp_path_factory.mktemp("plain"))
    workshop.plain(*torchrun())
    return results(workshop)


def results(workshop: Workshop) -> dict[str, str]:
    """What all ranks wrote."""
    kinds = ("losses", "final")
    return {p.name: p.read_text() for kind in kinds for p in workshop.path.glob(f"{kind}-*.txt")}


def test_a_storm(workshop: Workshop, plain: dict[str, str]) -> None:
    """Stopped after the very first step (the buckets are not laid out again yet), between two
    steps of one accumulation and in an evaluation; a rank killed, a rank with an exception, the
    supervisor killed: bitwise what the plain script comes to, loss by loss."""
    faults = (
        *("0,1,term", "1,9,kill", "2,17,raise", "0,20,flush", "0,33,supervisor"),
        *("2,37,term", "1,1e2,term"),
    )
    ends = []
    while not ends or ends[-1] != 0:
        job = Launched(workshop, *torchrun(), FAULTS=" ".join(faults))
        ends.append(job.ends())
        assert ends[-1] in (0, 75, -9), job.told()
        assert len(ends) <= len(faults), job.told()
    assert ends == [75, -9, 75, 75, 0], workshop.journal()
    assert results(workshop) == plain
    stopped = [int(str(e["step"] or 0)) for e in workshop.journal() if e["event"] == "started"]
    assert stopped[1] <= 2, "a stop that is asked for loses no step, and takes no more than one"


@pytest.mark.nightly
def test_another_number_of_ranks_is_refused(workshop: Workshop) -> None:
    """It is said at once what is expected, and nothing is lost."""
    first = Launched(workshop, *torchrun(), FAULTS="0,3,term")
    assert first.ends() == 75, first.told()
    argv = torchrun(ranks=2)
    other = Launched(workshop, *argv, options=("--accept-changes",))
    assert other.ends() == 70, other.told()
    other.wait_for("the job is of 2 ranks now, and what it continues from of 3")
    assert len(checkpoints(workshop)) == 1


@pytest.mark.nightly
def test_a_loop_that_only_one_rank_goes_through(workshop: Workshop) -> None:
    """A stop within it is answered where all ranks come to."""
    job = Launched(workshop, *torchrun("only-first"), FAULTS="0,0e2,term")
    assert job.ends() == 75, job.told()
    again = Launched(workshop, *torchrun("only-first"))
    assert again.ends() == 0, again.told()
    undisturbed = Workshop(workshop.path / "undisturbed")
    undisturbed.path.mkdir()
    undisturbed.plain(*torchrun("only-first"))
    assert results(workshop) == results(undisturbed)
