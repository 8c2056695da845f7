"""Thousands of damaged checkpoints: none is loaded wrong, none ends in anything but a clear error.

CKPTD_EXAMPLES=n tries n times as many. A failing case prints its number and its seed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BOUND_S
from simulated import SimulatedDisk

from ckptd.errors import DamagedError
from ckptd.store import manifest as manifests
from ckptd.store import retention, store

TIMES = int(os.environ.get("CKPTD_EXAMPLES", "1"))
DAMAGED, SIGNED = 8_000 * TIMES, 1_000 * TIMES
RUN = Path("/run")
CHECKPOINTS = RUN / "checkpoints"


def published() -> SimulatedDisk:
    """A disk with two checkpoints."""
    disk, dice = SimulatedDisk(RUN), random.Random(1)
    for step in (1, 2):
        files = {
            "model.safetensors": dice.randbytes(700),
            "optimizer.safetensors": dice.randbytes(700),
            "frozen.safetensors": b"the same in both",
            "state.json": b'{"format": 1, "step": %d}' % step,
        }
        store.publish(
            disk,
            CHECKPOINTS,
            step=step,
            attempt=1,
            files=files,
            outputs=(),
            created=0.0,
            fence=lambda: None,
        )
    return disk


Content = dict[str, bytes]


def bit(files: Content, name: str, dice: random.Random, _: Content) -> None:
    content = bytearray(files[name])
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    files[name] = bytes(content)


def burst(files: Content, name: str, dice: random.Random, _: Content) -> None:
    at = dice.randrange(len(files[name]))
    length = dice.randrange(1, 64)
    files[name] = files[name][:at] + dice.randbytes(length) + files[name][at + length :]


def zeros(files: Content, name: str, dice: random.Random, _: Content) -> None:
    at = dice.randrange(len(files[name]))
    files[name] = files[name][:at] + bytes(len(files[name]) - at)


def truncated(files: Content, name: str, dice: random.Random, _: Content) -> None:
    files[name] = files[name][: dice.randrange(len(files[name]))]


def longer(files: Content, name: str, dice: random.Random, _: Content) -> None:
    files[name] += dice.randbytes(dice.randrange(1, 50))


def swapped(files: Content, name: str, dice: random.Random, _: Content) -> None:
    other = dice.choice([one for one in files if one != name])
    files[name], files[other] = files[other], files[name]


def of_another_checkpoint(files: Content, name: str, dice: random.Random, older: Content) -> None:
    files[name] = older[name]


def gone(files: Content, name: str, dice: random.Random, _: Content) -> None:
    del files[name]


def number_edited(files: Content, name: str, dice: random.Random, _: Content) -> None:
    """A digit of the manifest, as a person would edit it."""
    text = files[manifests.NAME]
    at = dice.choice([i for i, byte in enumerate(text) if chr(byte).isdigit()])
    files[manifests.NAME] = text[:at] + b"%d" % dice.randrange(10) + text[at + 1 :]


def led_elsewhere(files: Content, name: str, dice: random.Random, _: Content) -> None:
    """The manifest, signed anew, lists a file of the other checkpoint, or no path at all."""
    body = json.loads(files[manifests.NAME])["manifest"]
    led = dice.choice([f"../000000001/{name}", f"/run/checkpoints/000000001/{name}", "..", "."])
    body["files"][led] = body["files"].pop(dice.choice(sorted(body["files"])))
    text = json.dumps(body)
    seal = manifests.sum_of(text.encode())
    files[manifests.NAME] = f'{{"manifest":{text},"xxh3_128":"{seal}"}}'.encode()


DAMAGES: tuple[Callable[[Content, str, random.Random, Content], None], ...] = (
    *(bit, bit, burst, zeros, truncated, longer, swapped),
    *(of_another_checkpoint, gone, number_edited, led_elsewhere),
)


def test_damage_is_never_loaded() -> None:
    """The damaged one is set aside and the older one is used, or it is byte for byte as it was."""
    original = published()
    paths = [CHECKPOINTS / retention.name_for(step, ()) for step in (1, 2)]
    older, newer = (
        {name: bytes(original.read(path / name)) for name in original.names(path)} for path in paths
    )
    harmless = 0
    for number in range(DAMAGED):
        dice = random.Random(f"damage {number}")
        files = dict(newer)
        dice.choice(DAMAGES)(files, dice.choice(sorted(files)), dice, older)
        disk = original.copy()
        for name in newer:
            if name in files:
                disk.damage(paths[1] / name, files[name])
            else:
                disk.remove(paths[1] / name)
        found, set_aside = store.newest(disk, CHECKPOINTS)
        assert found is not None, f"case {number}"
        if files == newer:
            harmless += 1
            assert (found.step, set_aside) == (2, []), f"case {number}"
        else:
            assert found.step == 1, f"case {number}: {files}"
            assert [one.path.name for one in set_aside] == ["000000002.damaged"], f"case {number}"
            assert str(paths[1]) in set_aside[0].why, f"case {number}: {set_aside[0].why}"
    assert harmless < DAMAGED / 20


def odd_things(path: Path) -> dict[str, Callable[[], None]]:
    """What may stand in a file's place, by name."""
    victim = path / "model.safetensors"
    content = victim.read_bytes()

    def linked() -> None:
        victim.unlink()
        (path.parent / "elsewhere").write_bytes(content)
        victim.symlink_to(path.parent / "elsewhere")

    def directory() -> None:
        victim.unlink()
        victim.mkdir()

    def pipe() -> None:
        victim.unlink()
        os.mkfifo(victim)

    def device() -> None:
        victim.unlink()
        victim.symlink_to("/dev/zero")

    def loop() -> None:
        victim.unlink()
        victim.symlink_to(victim.name)

    return {"linked": linked, "directory": directory, "pipe": pipe, "device": device, "loop": loop}


@pytest.mark.parametrize("name", ["linked", "directory", "pipe", "device", "loop"])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    """A link to the right content, a directory, a pipe and a device are no checkpoint's files: that
    is damage, and not a disk that can't be read."""
    from ckptd.host.disk import RealDisk

    done = store.publish(
        RealDisk(),
        tmp_path / "checkpoints",
        step=1,
        attempt=1,
        files={"model.safetensors": b"weights", "state.json": b"{}"},
        outputs=(),
        created=0.0,
        fence=lambda: None,
    )
    odd_things(done.path)[name]()
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        store.verify(RealDisk(), done.path)


@pytest.mark.parametrize("seed", [1, 2])
def test_signed_nonsense(tmp_path: Path, seed: int) -> None:
    """With all sums right and nonsense in it, a checkpoint is an error or an ordinary value: no
    other exception, no file outside of it opened, no code executed."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "fuzzed.py", str(SIGNED), str(seed), tmp_path],
        capture_output=True,
        text=True,
        timeout=BOUND_S * TIMES,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{SIGNED} cases" in done.stdout
