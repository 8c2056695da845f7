"""A scenario of the store, every fault in it, and what must hold after each.

The scenario publishes steps 1, 2 and 3 and prunes to two after each; then the newest checkpoint is
damaged, and the newest sound one is looked for. The ledger notes what the store promised: it knows
nothing of how the store works.
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
STEPS = (1, 2, 3)
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


@dataclass
class Ledger:
    """What was promised: the steps whose publish returned, and the one that was damaged."""

    returned: list[int] = field(default_factory=list)
    damaged: int | None = None

    @property
    def least(self) -> int:
        """The step that must still be there."""
        return max((step for step in self.returned if step != self.damaged), default=0)


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
        key = (disk.fingerprint(), tuple(ledger.returned), ledger.damaged)
        if key not in self._seen:
            self._seen.add(key)
            self.everything(disk, ledger, where)

    def everything(self, disk: Disk, ledger: Ledger, where: str) -> None:
        names = disk.names(self.checkpoints)
        for name in retention.newest_first(names):
            # What is two older than the damaged one may share a file with it.
            if ledger.damaged is None or (ledger.damaged - int(name[:9])) % 2:
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
    """The newest one is at least what was promised last, and is what was published."""
    found, _ = store.newest(disk, checkpoints)
    step = 0 if found is None else found.step
    assert step >= ledger.least, f"{where}: {ledger.least} was durable, the newest is {step}"
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


def scenario(disk: Disk, checkpoints: Path, ledger: Ledger) -> Iterator[None]:
    """Run it; a yield is a moment at which the ledger is right. Failures are lived with."""
    for step in STEPS:
        try:
            publish(disk, checkpoints, step)
        except NotDurableError:
            yield
            continue
        ledger.returned.append(step)
        yield
        with suppress(OSError):  # as the supervisor does: the next prune tries again
            store.prune(disk, checkpoints, KEEP)
        yield
    damage_newest(disk, checkpoints, ledger)
    yield
    try:
        found, _ = store.newest(disk, checkpoints)
    except OSError:
        yield
        return
    assert found is None or found.step != ledger.damaged, "a damaged checkpoint was loaded"
    assert (found.step if found else 0) >= ledger.least, "a sound checkpoint was passed over"
    yield


def damage_newest(disk: Disk, checkpoints: Path, ledger: Ledger) -> None:
    if ledger.returned and ledger.returned[-1] == STEPS[-1]:
        ledger.damaged = STEPS[-1]
        path = checkpoints / retention.name_for(STEPS[-1], [])
        disk.damage(path / "state.json", b"state of 8")  # as long as it was
        disk.damage(path / "model.frozen.safetensors", b"melted" * 7)


def with_fault(run: Path, checks: Checks, fault: Fault) -> None:
    """The scenario with one fault; checked whenever the ledger is right, and after the fault."""
    disk = SimulatedDisk(run, fault)
    ledger = Ledger()
    try:
        for _ in scenario(disk, run / "checkpoints", ledger):
            if fault.struck or not fault.at:
                checks.survivors(disk, ledger, fault)
    except PowerCut:
        checks.survivors(disk, ledger, fault)


def enumerate_faults(run: Path, how: str, code: int) -> int:
    """Operation 1, then 2, 3, … goes wrong, until the scenario runs clean.

    Returns:
        The number of operations.

    Raises:
        AssertionError: a promise was broken.
    """
    checks = Checks(run)
    with_fault(run, checks, Fault())
    for n in range(1, OPERATIONS_MAX):
        fault = Fault(n, how, code)
        with_fault(run, checks, fault)
        if not fault.struck:
            return n - 1
    raise AssertionError(f"the scenario has not ended after {OPERATIONS_MAX} operations")
