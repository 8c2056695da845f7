"""Publish, find, verify, drop, set aside and fence, on the real disk; damage of every kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from simulated import Fault, PowerCut, SimulatedDisk

from ckptd.cli import show
from ckptd.errors import DamagedError, FencedError, NotDurableError
from ckptd.host.disk import Disk, RealDisk
from ckptd.store import fence, manifest, retention, store

DISK = RealDisk()
FILES = {"model.safetensors": b"\x01\x02" * 500, "state.json": b'{"a": 1}', "empty": b""}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def publish(
    checkpoints: Path, step: int, disk: Disk = DISK, attempt: int = 1, **more: object
) -> store.Checkpoint:
    """Publish with what a test does not care about filled in."""
    options = {"files": FILES, "outputs": (), "created": 12.5, "fence": lambda: None, **more}
    return store.publish(disk, checkpoints, step=step, attempt=attempt, **options)


def sealed(body: dict) -> bytes:
    """A manifest file with a right sum of itself, whatever it says."""
    return sealed_text(json.dumps(body))


def sealed_text(body: str) -> bytes:
    raw = body.encode()
    return msgspec.json.encode({"manifest": msgspec.Raw(raw), "xxh3_128": manifest.sum_of(raw)})


def body_of(path: Path) -> dict:
    return json.loads((path / manifest.NAME).read_bytes())["manifest"]


# Publish and find.


def test_what_was_published_is_found(checkpoints: Path) -> None:
    """The newest checkpoint has the files, step and attempt that were published."""
    published = publish(checkpoints, 7, attempt=3)
    found, set_aside = store.newest(DISK, checkpoints)
    assert (found, set_aside) == (published, [])
    assert (found.step, found.manifest.attempt, found.manifest.created) == (7, 3, 12.5)
    assert {name: bytes(DISK.read(found.path / name)) for name in FILES} == FILES
    assert DISK.names(checkpoints) == ["000000007"]


def test_nothing_published_is_nothing_found(checkpoints: Path) -> None:
    """No directory, an empty one and one of leftovers have no newest checkpoint."""
    assert store.newest(DISK, checkpoints) == (None, [])
    checkpoints.mkdir()
    assert store.newest(DISK, checkpoints) == (None, [])
    for name in (".tmp-000000001-1", ".drop-000000001", "000000001.damaged", "notes"):
        (checkpoints / name).mkdir()
    assert store.newest(DISK, checkpoints) == (None, [])


def test_any_buffer_is_published(checkpoints: Path) -> None:
    """Lengths are in bytes, also for a view of wider elements."""
    wide = memoryview(bytes(range(64))).cast("d")
    found = publish(checkpoints, 1, files={**FILES, "wide": wide, "array": bytearray(b"abc")})
    assert found.manifest.files["wide"].length == 64
    assert store.verify(DISK, found.path) == found.manifest


def test_one_step_published_twice(checkpoints: Path) -> None:
    """Checkpoints of one step are called ".1", ".2" …; the last one is the newest."""
    names = [publish(checkpoints, 5, files={**FILES, "n": b"%d" % i}).path.name for i in range(12)]
    assert names == ["000000005", *(f"000000005.{i}" for i in range(1, 12))]
    found, _ = store.newest(DISK, checkpoints)
    assert DISK.read(found.path / "n")[:] == b"11"
    publish(checkpoints, 6)
    assert store.newest(DISK, checkpoints)[0].step == 6


def test_a_lower_step_supersedes_the_higher_ones(checkpoints: Path) -> None:
    """A job that went on from 200 publishes 250: 250 is the newest, 300 and 400 are kept under
    another name, listed, and in nobody's way; they are not pruned."""
    for step in (200, 300, 300, 400):
        publish(checkpoints, step)
    made = publish(checkpoints, 250)
    assert store.newest(DISK, checkpoints) == (made, [])
    aside = [f"000000{name}.superseded" for name in ("300.1", "300", "400")]
    assert DISK.names(checkpoints) == ["000000200", "000000250", *sorted(aside)]
    assert store.prune(DISK, checkpoints, keep=1) == ["000000200"]
    assert publish(checkpoints, 300).path.name == "000000300"
    assert publish(checkpoints, 260).path.name == "000000260"
    rows = store.listing(DISK, checkpoints)
    assert [row.path.name for row in rows] == [
        *("000000260", "000000250"),
        *sorted([*aside, "000000300.superseded-2"]),
    ]
    assert {row.state for row in rows[2:]} == {"set aside: superseded"}


def test_a_leftover_of_the_same_name_is_no_obstacle(checkpoints: Path) -> None:
    """What a crash left under the temporary name is replaced, none of it published."""
    leftover = checkpoints / ".tmp-000000001-1"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_bytes(b"junk")
    found = publish(checkpoints, 1)
    assert DISK.names(found.path) == sorted([*FILES, manifest.NAME])
    assert DISK.names(checkpoints) == ["000000001"]


def test_outputs_are_synced_first(tmp_path: Path) -> None:
    """An output that is there is durable before the checkpoint is; a missing one is passed over."""
    disk = SimulatedDisk(tmp_path)
    disk.write(tmp_path / "log", b"12345678")
    disk.sync_directory(tmp_path)
    publish(tmp_path / "c", 1, disk, outputs=[tmp_path / "log", tmp_path / "none"])
    for survivor in disk.survivors(0):
        assert survivor.read(tmp_path / "log") == b"12345678"


@pytest.mark.parametrize("at", [1, 4, 7, 11])
def test_a_refusal_is_not_durable(tmp_path: Path, at: int) -> None:
    """The disk's error becomes NotDurableError with its errno, the path and the length; the older
    checkpoint is the newest as before, and no half of the new one is left."""
    disk = SimulatedDisk(tmp_path)
    publish(tmp_path / "c", 1, disk)
    disk.fault = Fault(at, "once", errno.ENOSPC)
    with pytest.raises(NotDurableError, match=r"No space left.*1008 bytes") as caught:
        publish(tmp_path / "c", 2, disk, outputs=[tmp_path / "c" / "000000001" / "empty"])
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename is not None
    assert store.newest(disk, tmp_path / "c")[0].step == 1
    assert disk.names(tmp_path / "c") == ["000000001"]


def test_a_name_that_no_manifest_may_list_is_refused(checkpoints: Path) -> None:
    """A file called as the manifest is never published."""
    with pytest.raises((ValueError, NotDurableError)):
        publish(checkpoints, 1, files={**FILES, manifest.NAME: b""})
    with pytest.raises(ValueError, match="can't be a file"):
        publish(checkpoints, 1, files={**FILES, ".hidden": b""})
    with pytest.raises(ValueError, match=r"has state\.json"):
        publish(checkpoints, 1, files={"model.safetensors": b""})
    assert DISK.names(checkpoints) == []


# Drop.


def test_prune_keeps_the_newest(checkpoints: Path) -> None:
    """All but the `keep` newest go, oldest first, with what crashes left; the damaged stay."""
    for step in (1, 2, 2, 3):
        publish(checkpoints, step)
    for name in (".tmp-000000009-1", ".drop-000000001", "000000004.damaged"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "f").write_bytes(b"")
    assert store.prune(DISK, checkpoints, keep=2) == ["000000001", "000000002"]
    assert DISK.names(checkpoints) == ["000000002.1", "000000003", "000000004.damaged"]
    assert store.prune(DISK, checkpoints, keep=2) == []


@pytest.mark.parametrize("keep", [1, 0, -3])
def test_prune_never_drops_the_newest(checkpoints: Path, keep: int) -> None:
    """However few are to be kept, one is."""
    publish(checkpoints, 1)
    publish(checkpoints, 2)
    store.prune(DISK, checkpoints, keep)
    assert DISK.names(checkpoints) == ["000000002"]


def test_prune_removes_whatever_has_a_temporary_name(checkpoints: Path) -> None:
    """A stray file or link of a temporary name goes, and so does an old checkpoint that is a link;
    where the link points to nothing is touched."""
    moved = checkpoints.parent / "moved"
    publish(checkpoints, 1).path.rename(moved)
    (checkpoints / "000000001").symlink_to(moved)
    publish(checkpoints, 2)
    (checkpoints / ".tmp-file").write_bytes(b"x")
    (checkpoints / ".tmp-link").symlink_to(moved)
    (checkpoints / ".drop-dangling").symlink_to("none")
    assert store.prune(DISK, checkpoints, keep=1) == ["000000001"]
    assert DISK.names(checkpoints) == ["000000002"]
    assert DISK.names(moved) == sorted([*FILES, manifest.NAME])


def test_names_order_by_number() -> None:
    """Steps and repetitions are numbers, not text; other names are no checkpoints."""
    names = ["000000002.10", "000000002.9", "1000000000", "999999999", "000000002", "000000010"]
    assert retention.newest_first([*names, "x", "1", "000000002.0", "000000002.01", ".tmp-1"]) == [
        *("1000000000", "999999999", "000000010"),
        *("000000002.10", "000000002.9", "000000002"),
    ]


# Damage. Each is done to a whole checkpoint; the error must name the file in question.


def flip(name: str) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
        return name

    return damage


def shorten(name: str, to: Callable[[int], int]) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        content = (path / name).read_bytes()
        (path / name).write_bytes((content + b"x")[: to(len(content))])
        return name

    return damage


def replace(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path], str]:
    """Put something else in a file's place; the file itself is kept outside."""

    def damage(path: Path) -> str:
        outside = path.parent.parent / "outside"
        (path / name).rename(outside)
        make(path / name, outside)
        return name

    return damage


def edit(change: Callable[[dict], object], names: str = manifest.NAME) -> Callable[[Path], str]:
    """Change what the manifest says and seal it again, as an attacker would."""

    def damage(path: Path) -> str:
        body = body_of(path)
        change(body)
        (path / manifest.NAME).write_bytes(sealed(body))
        return names

    return damage


def listed(name: str) -> Callable[[Path], str]:
    file = {"length": 0, "xxh3_128": manifest.sum_of(b"")}
    return edit(lambda body: body["files"].update({name: file}))


def content(raw: bytes) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        (path / manifest.NAME).write_bytes(raw)
        return manifest.NAME

    return damage


def changed_digit(path: Path) -> str:
    raw = (path / manifest.NAME).read_bytes()
    assert raw.count(b'"step":2') == 1
    (path / manifest.NAME).write_bytes(raw.replace(b'"step":2', b'"step":3'))
    return manifest.NAME


def renamed_to_another_step(path: Path) -> str:
    (path / manifest.NAME).write_bytes(sealed({**body_of(path), "step": 3}))
    return path.name


def a_file_in_its_place(path: Path) -> str:
    shutil.rmtree(path)
    path.write_bytes(b"x")
    return path.name


def a_dangling_link_in_its_place(path: Path) -> str:
    shutil.rmtree(path)
    path.symlink_to(path.parent / "none")
    return path.name


def a_link_to_itself_in_its_place(path: Path) -> str:
    shutil.rmtree(path)
    path.symlink_to(path.name)
    return path.name


def huge(name: str) -> Callable[[Path], str]:
    """A file of as many bytes as the file system can do; nearly none of them are on the disk."""

    def damage(path: Path) -> str:
        for length in (7 << 60, 1 << 43, 1 << 40):
            with suppress(OSError):
                os.truncate(path / name, length)
                return f"{name}: {length} bytes, expected"
        raise AssertionError("no large file can be made here")

    return damage


def length_of(value: object) -> Callable[[dict], object]:
    return lambda body: body["files"]["state.json"].update(length=value)


EVERY = [*FILES, manifest.NAME]
DAMAGES = {
    **{f"bit of {name}": flip(name) for name in EVERY if name != "empty"},
    **{f"last byte of {name}": shorten(name, lambda n: n - 1) for name in EVERY if name != "empty"},
    **{f"all of {name}": shorten(name, lambda n: 0) for name in EVERY if name != "empty"},
    **{f"one more byte of {name}": shorten(name, lambda n: n + 1) for name in EVERY},
    **{f"missing {name}": replace(name, lambda at, outside: None) for name in EVERY},
    **{f"link {name}": replace(name, lambda at, outside: at.symlink_to(outside)) for name in EVERY},
    **{f"directory {name}": replace(name, lambda at, outside: at.mkdir()) for name in EVERY},
    **{f"pipe {name}": replace(name, lambda at, outside: os.mkfifo(at)) for name in EVERY},
    "changed digit of step": changed_digit,
    "resealed step": renamed_to_another_step,
    "file for directory": a_file_in_its_place,
    "dangling link for directory": a_dangling_link_in_its_place,
    "link to itself for directory": a_link_to_itself_in_its_place,
    **{
        f"link to itself for {name}": replace(name, lambda at, outside: at.symlink_to(at.name))
        for name in EVERY
    },
    **{f"huge {name}": huge(name) for name in EVERY},
    "no state listed": edit(lambda body: body["files"].pop("state.json"), "state.json"),
    "no files listed": edit(lambda body: body.update(files={}), "state.json"),
    "parent's file": listed("../outside"),
    "absolute file": listed("/etc/passwd"),
    "dots": listed(".."),
    "one dot": listed("."),
    "no name": listed(""),
    "null in name": listed("a\0b"),
    "newline in name": listed("a\n"),
    "slash": listed("a/b"),
    "long name": listed("a" * 201),
    "itself": listed(manifest.NAME),
    "file that is not there": edit(
        lambda body: body["files"].update(more={"length": 0, "xxh3_128": "0" * 32}), "more"
    ),
    "another format": edit(lambda body: body.update(format=2)),
    "unknown field": edit(lambda body: body.update(more=1)),
    "missing field": edit(lambda body: body.pop("attempt")),
    "negative step": edit(lambda body: body.update(step=-2)),
    "negative attempt": edit(lambda body: body.update(attempt=-1)),
    "step of text": edit(lambda body: body.update(step="2")),
    "step of a fraction": edit(lambda body: body.update(step=2.5)),
    "huge step": edit(lambda body: body.update(step=10**18)),
    "huger step": edit(lambda body: body.update(step=10**400)),
    "hugest step": content(
        sealed_text('{"format":1,"step":' + "9" * 5000 + ',"attempt":1,"created":0.0,"files":{}}')
    ),
    "huge length": edit(length_of(2**60), "state.json"),
    "huger length": edit(length_of(2**63 - 1)),
    "hugest length": edit(length_of(10**400)),
    "negative length": edit(length_of(-1)),
    "odd sum": edit(lambda body: body["files"]["state.json"].update(xxh3_128="0")),
    "upper-case sum": edit(lambda body: body["files"]["state.json"].update(xxh3_128="A" * 32)),
    "garbage": content(b"\xff\x00garbage"),
    "no JSON": content(b"{"),
    "a list": content(b"[]"),
    "not utf-8": content(b'{"manifest": {"a": "\xff"}, "xxh3_128": "\xff"}'),
    "nothing": content(b""),
    "null manifest": content(sealed({})),
    "deep nesting": content(b"[" * 200_000 + b"]" * 200_000),
    "deep nesting inside": content(b'{"manifest":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    "long number": content(b'{"manifest":' + b"9" * 200_000 + b',"xxh3_128":""}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_set_aside(checkpoints: Path, damage: Callable[[Path], str]) -> None:
    """`verify` refuses, naming the file; `newest` sets it aside and uses the next older one; the
    next publish of that step is the newest again."""
    older = publish(checkpoints, 1)
    path = publish(checkpoints, 2).path
    name = damage(path)
    with pytest.raises(DamagedError) as caught:
        store.verify(DISK, path)
    assert name in str(caught.value)
    assert str(path) in str(caught.value)
    rows = store.listing(DISK, checkpoints)
    assert [row.path.name for row in rows] == ["000000002", "000000001"]
    found, set_aside = store.newest(DISK, checkpoints)
    assert found == older
    assert set_aside == [store.SetAside(checkpoints / "000000002.damaged", str(caught.value))]
    assert DISK.names(checkpoints) == ["000000001", "000000002.damaged"]
    assert store.newest(DISK, checkpoints) == (older, [])
    assert publish(checkpoints, 2).path == path
    assert store.newest(DISK, checkpoints)[0].path == path


def test_every_byte_of_a_manifest_counts(checkpoints: Path) -> None:
    """Whatever single bit of a manifest is changed, it is not accepted as another manifest."""
    path = publish(checkpoints, 2).path / manifest.NAME
    raw = path.read_bytes()
    right = manifest.decode(raw, "m")
    for at in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            try:
                read = manifest.decode(bytes(changed), "m")
            except DamagedError:
                continue
            assert read == right


def test_all_damaged_is_none_found(checkpoints: Path) -> None:
    """With no sound one there is none; each is kept under a name of its own, newest first."""
    for step in (1, 1, 2):
        flip("state.json")(publish(checkpoints, step).path)
    found, set_aside = store.newest(DISK, checkpoints)
    assert found is None
    assert [one.path.name for one in set_aside] == [
        *("000000002.damaged", "000000001.1.damaged", "000000001.damaged")
    ]
    flip("state.json")(publish(checkpoints, 1).path)
    assert store.newest(DISK, checkpoints)[1][0].path.name == "000000001.damaged-2"
    rows = store.listing(DISK, checkpoints)
    assert {row.state for row in rows} == {"set aside: damaged"}
    assert len(rows) == 4


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    """While reading fails, `newest` raises the disk's error and sets nothing aside."""
    disk = SimulatedDisk(tmp_path)
    publish(tmp_path / "c", 1, disk)
    before, disk.fault = disk.fingerprint(), Fault()
    store.newest(disk, tmp_path / "c")
    operations = disk.fault.count
    for at in range(1, operations + 1):
        disk.fault = Fault(at, "ever", errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            store.newest(disk, tmp_path / "c")
        assert disk.fingerprint() == before
    assert operations > 5


def test_a_file_that_nobody_listed_does_no_harm(checkpoints: Path) -> None:
    """A file that the manifest does not list is not read, and is no damage."""
    found = publish(checkpoints, 1)
    (found.path / "more").write_bytes(b"x")
    assert store.newest(DISK, checkpoints) == (found, [])


def test_listing(checkpoints: Path) -> None:
    """Newest first with step, attempt, length and time; then those set aside."""
    publish(checkpoints, 1, attempt=4)
    broken = publish(checkpoints, 2).path
    publish(checkpoints, 3)
    (broken / manifest.NAME).write_bytes(b"{")
    (checkpoints / "000000009.damaged").mkdir()
    rows = store.listing(DISK, checkpoints)
    assert [(row.path.name, row.step, row.attempt, row.length) for row in rows] == [
        ("000000003", 3, 1, 1008),
        ("000000002", -1, -1, 0),
        ("000000001", 1, 4, 1008),
        ("000000009.damaged", -1, -1, 0),
    ]
    assert [row.state.split(":")[0] for row in rows] == [
        *("durable", "damaged", "durable", "set aside")
    ]
    assert rows[2].created == 12.5


def test_manifests_come_back(checkpoints: Path) -> None:
    """What `encode` writes `decode` reads."""
    files = {name: manifest.File(3, "0" * 32) for name in ("a", manifest.STATE)}
    made = manifest.Manifest(1, 5, 6, 1e9, files)
    assert manifest.decode(manifest.encode(made), "m") == made


def test_the_longest_manifest_is_read(checkpoints: Path) -> None:
    """As many files as there may be, of the longest names, lengths and sums, fit in the bound;
    one more is neither written nor read."""
    file = manifest.File(2**60, "0" * 32)
    files = {f"{number:0200d}": file for number in range(99_999)} | {manifest.STATE: file}
    longest = manifest.Manifest(1, 10**18 - 1, 10**18 - 1, 1.7976931348623157e308, files)
    content = manifest.encode(longest)
    assert 0.9 * manifest.BYTES_MAX < len(content) <= manifest.BYTES_MAX < 32 << 20
    assert manifest.decode(content, "m") == longest
    with pytest.raises(ValueError, match="at most 100000 files"):
        manifest.encode(msgspec.structs.replace(longest, files={**files, "more": file}))


def test_verifying_takes_little_memory(checkpoints: Path) -> None:
    """However long a file is, no more than some MiB of it are in this process at once."""
    path = publish(checkpoints, 1, files={**FILES, "large": bytes(64 << 20)}).path
    code = (
        "import resource, sys; from pathlib import Path; from ckptd.host.disk import RealDisk;"
        "from ckptd.store import store; rss = lambda: "
        "int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]);"
        "before = rss(); store.verify(RealDisk(), Path(sys.argv[1])); print(rss() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8 << 10, f"{done.stdout} KiB more"


# The fence.


def test_attempts_are_numbered(tmp_path: Path) -> None:
    """Each claim is one more; only the last few files are kept; the newest one passes."""
    assert [fence.claim(DISK, tmp_path, "me") for _ in range(12)] == list(range(1, 13))
    assert DISK.names(tmp_path / "attempts") == [f"{n:06d}" for n in range(5, 13)]
    assert bytes(DISK.read(tmp_path / "attempts" / "000012")) == b"me"
    fence.check(DISK, tmp_path, 12)


def test_an_older_attempt_publishes_nothing(tmp_path: Path) -> None:
    """It is refused with both numbers, after all its work, and leaves nothing visible."""
    old, new = fence.claim(DISK, tmp_path, "old"), fence.claim(DISK, tmp_path, "new")
    checkpoints = tmp_path / "checkpoints"
    kept = publish(checkpoints, 1, fence=lambda: fence.check(DISK, tmp_path, new))
    with pytest.raises(FencedError, match=r"attempt 1 .*attempt 2"):
        publish(checkpoints, 2, fence=lambda: fence.check(DISK, tmp_path, old))
    assert DISK.names(checkpoints) == ["000000001"]
    assert store.newest(DISK, checkpoints) == (kept, [])


def test_an_attempt_of_a_run_that_was_replaced_is_none(tmp_path: Path) -> None:
    """The numbers were counted anew, and are lower: what is not among them publishes nothing."""
    fence.claim(DISK, tmp_path, "new")
    with pytest.raises(FencedError, match=r"attempt 7 .*attempt 1"):
        fence.check(DISK, tmp_path, 7)


def test_numbers_that_were_removed_fence_nobody_off(tmp_path: Path) -> None:
    """No directory of attempts, an empty one, and one of other files say nothing of a new copy."""
    for make in (lambda: None, (tmp_path / "attempts").mkdir, (tmp_path / "attempts/x").touch):
        make()
        fence.check(DISK, tmp_path, 7)


def test_the_fence_is_asked_last(tmp_path: Path) -> None:
    """Between the fence's question and the rename the disk does nothing else."""
    disk = SimulatedDisk(tmp_path)
    asked = []
    disk.fault = Fault()
    publish(tmp_path / "c", 1, disk, fence=lambda: asked.append(disk.fault.count))
    whole = disk.fault.count
    assert asked == [whole - 2]  # then the rename and the sync of its directory


class Rivalry(SimulatedDisk):
    """Another supervisor does the same operations, each a moment before us, `times` times."""

    def __init__(self, root: Path, times: int) -> None:
        super().__init__(root)
        self.times = times

    def write(self, path: Path, content: bytes) -> None:
        if self.times > 0:
            self.times -= 1
            super().write(path, b"rival")
        super().write(path, content)

    def remove(self, path: Path) -> None:
        super().remove(path)
        super().remove(path)


def test_two_claims_at_once_are_two_numbers(tmp_path: Path) -> None:
    """Who is second to create a number takes the next one; who never is first gives up."""
    disk = Rivalry(tmp_path, 3)
    assert fence.claim(disk, tmp_path, "me") == 4
    disk.times = 10**9
    with pytest.raises(FencedError, match="1000 tries"):
        fence.claim(disk, tmp_path, "me")


def test_two_claims_at_once_may_drop_the_same_file(tmp_path: Path) -> None:
    """That an old number's file was removed by another is no failure of a claim."""
    disk = Rivalry(tmp_path, 0)
    assert [fence.claim(disk, tmp_path, "me") for _ in range(12)] == list(range(1, 13))


@pytest.mark.parametrize("how", ["once", "cut", "cut within"])
def test_no_fault_gives_a_number_twice(tmp_path: Path, how: str) -> None:
    """Whatever fails or is cut while claiming, a later claim is larger than any that returned."""
    at = 0
    while True:
        at += 1
        disk, returned = SimulatedDisk(tmp_path, Fault(at, how)), []
        with suppress(OSError, PowerCut):
            while len(returned) < 10:
                returned.append(fence.claim(disk, tmp_path, "me"))
        for survivor in disk.survivors(at):
            assert fence.claim(survivor, tmp_path, "later") > max(returned, default=0), f"{at=}"
        if not disk.fault.struck:
            break
    assert at > 40


def test_what_is_shown_of_several_ranks(checkpoints: Path) -> None:
    """Of how many it is, and how much of each is not what rank 0 has."""
    empty = {"items": []}
    state = {
        "components": {},
        "position": {"levels": []},
        "vars": {"tree": empty},
        "generators": {},
        "outputs": {},
        "values": {},
    }
    files = {
        "state.json": msgspec.json.encode(state),
        "model.bin": b"same",
        "rank-1.state.json": b"another",
        "rank-1.model.bin": b"same",
    }
    done = publish(checkpoints, 7, files=files)
    shown = CliRunner().invoke(show.command, [str(done.path)])
    assert shown.exit_code == 0, shown.output
    assert "written by attempt 1, of 2 ranks" in shown.output
    assert "rank 1: state.json: 7 bytes; 1 more, the same as rank 0's" in shown.output
