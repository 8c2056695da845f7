"""Whatever a DataLoader draws from, whenever it is interrupted: the bits are the plain run's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Workshop

sys.path.insert(0, str(Path(__file__).parent))
import matrix

pytestmark = pytest.mark.real

LOADERS = str(Path(__file__).parent / "loaders.py")


def check(workshop: Workshop, group: str, strikes: list[str]) -> None:
    """Interrupt a group's job at each of these in turn, and let it finish: the same output."""
    out, plain = workshop.path / "out", workshop.path / "plain"
    workshop.plain(sys.executable, LOADERS, group, str(plain))
    for strike in [*strikes, ""]:
        done = workshop.launch(sys.executable, LOADERS, group, str(out), STRIKE_AT=strike)
        assert done.returncode == (75 if strike else 0), strike + done.stdout + done.stderr
        found, expected = out.read_text().splitlines(), plain.read_text().splitlines()
        wrong = [i for i, line in enumerate(found) if line != expected[i]]
        assert wrong == [], f"at {strike}, line {wrong[0]}: {found[wrong[0]]}"
    assert out.read_bytes() == plain.read_bytes()


def test_every_pair_of_factors_is_met() -> None:
    """Each value of each factor of the matrix meets each value of each other factor."""
    assert matrix.missing_pairs() == set()


@pytest.mark.parametrize("number", range(matrix.GROUPS))
def test_matrix(workshop: Workshop, number: int) -> None:
    """Map-style loaders over samplers, workers, prefetching, seeding and kept generators."""
    cases = [(row.name, (row.moment,)) for row in matrix.group(number)]
    check(workshop, str(number), matrix.strikes(cases))


@pytest.mark.parametrize("name", matrix.SPECIAL)
def test_special(workshop: Workshop, name: str) -> None:
    """Loaders made anew, generators in odd places, loops left early, iterable datasets."""
    check(workshop, name, matrix.strikes(list(matrix.SPECIAL[name].items())))
