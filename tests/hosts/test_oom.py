"""Whose end an out-of-memory kill explains."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.host import memory
from ckptd.host.memory import OomWatch

OWN = Path("/own")


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The kernel's counts."""
    counts = {"": 7, str(OWN): 3}
    monkeypatch.setattr(memory, "_oom_kills", lambda: dict(counts))
    monkeypatch.setattr(memory, "_groups", lambda: iter([(OWN, memory._VERSION_2)]))
    return counts


@pytest.mark.parametrize("code", [-9, 137, 1])
def test_in_its_own_group(kills: dict[str, int], code: int) -> None:
    """It is one of the job's: a loader worker's death ends the job with an exception."""
    watch = OomWatch()
    kills[""] += 1
    kills[str(OWN)] += 1
    assert "out of memory: the kernel killed a process of its control group" in str(
        watch.found(code)
    )


@pytest.mark.parametrize(("code", "named"), [(-9, True), (137, True), (1, False), (-11, False)])
def test_somewhere_on_the_machine(kills: dict[str, int], code: int, named: bool) -> None:
    """It may be anybody's: it explains no segfault and no exception, and a SIGKILL only maybe."""
    watch = OomWatch()
    kills[""] += 1
    found = watch.found(code)
    assert (found is not None) == named
    assert found is None or found.startswith("maybe")


def test_before(kills: dict[str, int]) -> None:
    """What was killed before the job was started is none of its."""
    assert OomWatch().found(-9) is None
