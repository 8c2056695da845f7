"""Scenarios of the store, every fault in them, and what must hold after each.

A scenario publishes some steps and prunes after each; then the newest checkpoint is damaged, and
the newest sound one is looked for. In one of them the last step is lower than the one before: the
job did not go on from that one, which was suspected. In the other one somebody deletes a
checkpoint from the middle. The ledger notes what the store promised: it knows nothing of how the
store works.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from simulated import Fault, PowerCut, SimulatedDisk

from ckptd.errors import DamagedError, NotDurableError
from ckptd.host.disk import Disk
from ckptd.store import retention, store

KEEP = 2
FOLLOWING = 9
FAILURES = [(how, code) for how in ("once", "ever") for code in (errno.ENOSPC, errno.EIO)]
CUTS = [(how, errno.EIO) for how in ("cut", "cut within")]
#: The run must end long before: an operation that is repeated for ever is a bug.
OPERATIONS_MAX = 1000


def content_of(step: int) -> dict[str, bytes]:
    """Files that are new in each step, and one that never changes."""
    return {
        "model.safetensors": bytes([step]) * 40,
        "model.frozen.safetensors": b"frozen" * 7,
        "state.json": b"state of %d" % step,
    }


@dataclass(frozen=True)
class Script:
    """Steps to publish, in order (negative: it is deleted by hand), and how many to keep."""

    acts: tuple[int, ...]
    keep: int


SCRIPTS = (Script((1, 2, 4, 3), keep=KEEP), Script((1, 2, 3, -2, 4), keep=KEEP + 1))


@dataclass
class Ledger:
    """What was asked for, in order, and whether it was promised: its publish returned.

    What is higher than a step that was promised later is not listed: it must not be found again.
    """

    asked: dict[int, bool] = field(default_factory=dict)
    damaged: int | None = None

    def returned(self, step: int) -> None:
        self.asked = {one: promised for one, promised in self.asked.items() if one < step}
        self.asked[step] = True

    @property
    def allowed(self) -> set[int]:
        """The steps that may be found: the one promised last, and what was asked for after it."""
        steps = {0}
        for step, promised in self.asked.items():
            if step != self.damaged:
                steps = {step} if promised else {*steps, step}
        return steps


class Checks:
    """What must hold after a fault; what was looked at already is not looked at again."""

    def __init__(self, run: Path) -> None:
        self.checkpoints = run / "checkpoints"
        self._seen: set[object] = set()

    def survivors(self, disk: SimulatedDisk, ledger: Ledger, fault: Fault) -> None:
        """Whatever a power cut leaves now, nothing promised is lost and nothing wrong is loaded."""
        where = f"{fault}, seed {fault.at}"
        for survivor in disk.survivors(fault.at):
            self._once(survivor, ledger, where)
        self._once(disk.copy(), ledger, f"{fault}, without a power cut")

    def _once(self, disk: SimulatedDisk, ledger: Ledger, where: str) -> None:
        key = (disk.fingerprint(), frozenset(ledger.allowed), ledger.damaged)
        if key not in self._seen:
            self._seen.add(key)
            self.everything(disk, ledger, where)

    def everything(self, disk: Disk, ledger: Ledger, where: str) -> None:
        if ledger.damaged is None:  # others than its neighbours may share a file with it
            for name in retention.newest_first(disk.names(self.checkpoints)):
                whole(disk, self.checkpoints / name, where)
        newest(disk, self.checkpoints, ledger, where)
        following(disk, self.checkpoints, where)


def whole(disk: Disk, path: Path, where: str) -> None:
    """A directory with a checkpoint's name is whole."""
    try:
        store.verify(disk, path)
    except DamagedError as error:
        raise AssertionError(f"{where}: {path.name} is there and not whole: {error}") from error


def newest(disk: Disk, checkpoints: Path, ledger: Ledger, where: str) -> None:
    """The newest one is what was promised last or asked for after it, and is as published."""
    found, _ = store.newest(disk, checkpoints)
    step = 0 if found is None else found.step
    assert step in ledger.allowed, f"{where}: the newest is {step}, not one of {ledger.allowed}"
    if found is not None:
        loaded(disk, found, where)


def loaded(disk: Disk, found: store.Checkpoint, where: str) -> None:
    expected = content_of(found.step)
    assert set(found.manifest.files) == set(expected), f"{where}: other files in {found}"
    for name, content in expected.items():
        read = bytes(disk.read(found.path / name))
        assert read == content, f"{where}: step {found.step}: {name} is {read!r}"


def following(disk: Disk, checkpoints: Path, where: str) -> None:
    """A healthy disk takes the next checkpoint, whatever was left behind."""
    publish(disk, checkpoints, FOLLOWING)
    store.prune(disk, checkpoints, KEEP)
    found, set_aside = store.newest(disk, checkpoints)
    assert found is not None, f"{where}: the following publish is not found"
    assert found.step == FOLLOWING, f"{where}: the following publish is not the newest"
    assert not set_aside, f"{where}: {set_aside}"
    loaded(disk, found, where)
    odd = [name for name in disk.names(checkpoints) if name.startswith(".")]
    assert not odd, f"{where}: prune left {odd}"


def publish(disk: Disk, checkpoints: Path, step: int) -> None:
    store.publish(
        disk,
        checkpoints,
        step=step,
        attempt=1,
        files=content_of(step),
        outputs=[checkpoints.parent / "log"],
        created=0.0,
        fence=lambda: None,
    )


def scenario(disk: Disk, checkpoints: Path, ledger: Ledger, script: Script) -> Iterator[None]:
    """Run it; a yield is a moment at which the ledger is right. Failures are lived with."""
    for step in script.acts:
        if step < 0:
            ledger.asked[-step] = False
            disk.lose(checkpoints / retention.name_for(-step, []))
            yield
            continue
        ledger.asked[step] = False
        try:
            publish(disk, checkpoints, step)
        except NotDurableError:
            yield
            continue
        ledger.returned(step)
        yield
        with suppress(OSError):  # as the supervisor does: the next prune tries again
            store.prune(disk, checkpoints, script.keep)
        yield
    damage_newest(disk, checkpoints, ledger, script.acts[-1])
    yield
    try:
        found, _ = store.newest(disk, checkpoints)
    except OSError:
        yield
        return
    step = 0 if found is None else found.step
    assert step != ledger.damaged, "a damaged checkpoint was loaded"
    assert step in ledger.allowed, f"{step} was used, not one of {ledger.allowed}"
    yield


def damage_newest(disk: Disk, checkpoints: Path, ledger: Ledger, step: int) -> None:
    if ledger.asked[step]:
        ledger.damaged = step
        path = checkpoints / retention.name_for(step, [])
        disk.damage(path / "state.json", b"state of 8")  # as long as it was
        disk.damage(path / "model.frozen.safetensors", b"melted" * 7)


def with_fault(run: Path, script: Script, checks: Checks, fault: Fault) -> None:
    """The scenario with one fault; checked whenever the ledger is right, and after the fault."""
    disk = SimulatedDisk(run, fault)
    ledger = Ledger()
    try:
        for _ in scenario(disk, run / "checkpoints", ledger, script):
            if fault.struck or not fault.at:
                checks.survivors(disk, ledger, fault)
    except PowerCut:
        checks.survivors(disk, ledger, fault)


def enumerate_faults(run: Path, how: str, code: int) -> int:
    """Operation 1, then 2, 3, … goes wrong, until the scenario runs clean; so for each scenario.

    Returns:
        The number of operations.

    Raises:
        AssertionError: a promise was broken.
    """
    return sum(_enumerate(run, script, how, code) for script in SCRIPTS)


def _enumerate(run: Path, script: Script, how: str, code: int) -> int:
    checks = Checks(run)
    with_fault(run, script, checks, Fault())
    for n in range(1, OPERATIONS_MAX):
        fault = Fault(n, how, code)
        with_fault(run, script, checks, fault)
        if not fault.struck:
            return n - 1
    raise AssertionError(f"the scenario has not ended after {OPERATIONS_MAX} operations")
