"""Hostile checkpoints, each signed as if it were right; reads COUNT of them and prints what failed.

    python fuzzed.py COUNT SEED PLACE

A case changes one thing in state.json, in a tensor file's header or in the manifest, and writes
all sums anew. Reading it must end in a ckptd error or in an ordinary value: no other exception, no
file outside of the checkpoint is opened, no code is executed.

Or it changes the directory: what is there and not listed must not be opened and does no harm; what
stands in a listed file's place, or leads elsewhere, must be said to be damage.
"""

import copy
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ckptd import wire
from ckptd.errors import CkptdError, DamagedError
from ckptd.host import memory
from ckptd.host.disk import RealDisk
from ckptd.store import manifest as manifests
from ckptd.store import store
from ckptd.worker import job as jobs
from ckptd.worker import settings

HOSTILE = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2**31,
        2**63,
        -(2**70),
        1e308,
        "",
        "x",
        "..",
        "../../etc/passwd",
    ),
    *("/etc/passwd", "__class__", "__import__('os').system('true')", "\0", "1e999", "float32"),
    *([], {}, [[]], [None] * 3, {"$": "tensor"}, {"$": "same", "as": 10**6}, {"$": "dict"}),
    *({"$": "int", "value": "zz"}, {"$": "generator", "value": {}}, {"$": "dtype", "value": "os"}),
    *({"$": "array", "dtype": "O", "shape": [2], "parts": [0], "order": "C", "#": 1}, "é" * 1000),
)
BANNED = ("exec", "os.system", "subprocess.Popen", "os.exec", "os.remove", "os.rename", "socket")


class Link:
    """A link with nobody at the other end."""

    orphaned = False
    durable = 0
    sent = None
    snapshot = ()

    def __init__(self, address, hello, arenas, on_orphaned):
        path = Path(address) / "checkpoints" / "000000001"
        checkpoint = str(path) if path.exists() or path.is_symlink() else None
        self.welcome = wire.Welcome("fuzz", address, 1, checkpoint, None, 1)
        self.page = wire.StatusPage(memoryview(bytearray(wire.PAGE_BYTES)))

    def send(self, message, descriptors=()):
        if isinstance(message, wire.Snapshot):
            Link.sent = message, descriptors[0]
        return True

    def forward_signals(self):
        pass


class Plain:
    def __init__(self):
        self.count, self.rng = 3, np.random.default_rng(1)


def script(run):
    """Objects of many kinds under a job, in the middle of a loop; the job."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
    optimizer = torch.optim.Adam(model[0].parameters())
    model[0](torch.rand(2, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    job = jobs.LaunchedJob(str(run), {"model": model, "optimizer": optimizer})
    job.track(
        scheduler=scheduler,
        plain=Plain(),
        nest={"a": [1, 2.5, (3, None)], "t": torch.arange(6).view(2, 3), "n": np.eye(2)},
        odd=[torch.rand(2).to(torch.complex64), torch.eye(2).to_sparse(), 2**80, float("nan")],
        generator=torch.Generator().manual_seed(4),
    )
    job.vars(best=1.5, names={"x": {1, 2}})
    return job


def pause(job):
    """Go into two loops and have the state taken there."""
    for _ in job.loop(range(2)):
        for number, _ in enumerate(job.loop(DataLoader(range(6), 2, shuffle=True))):
            if number == 1:
                job.send_snapshot(keep=False)
                return


class UnsyncedDisk(RealDisk):
    """No power cut is tried here, and waiting for the disk would be most of a case."""

    def sync(self, path):
        pass

    def sync_directory(self, path):
        pass


def publish(run, files):
    store.publish(
        UnsyncedDisk(),
        run / "checkpoints",
        step=1,
        attempt=1,
        files=files,
        outputs=(),
        created=0.0,
        fence=lambda: None,
    )


def nodes(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from nodes(item, (*at, key))


def changed(document, dice):
    """A copy with one place changed."""
    document = copy.deepcopy(document)
    *way, last = dice.choice([at for at in nodes(document) if at])
    owner = document
    for key in way:
        owner = owner[key]
    kind = dice.random()
    if kind < 0.15:
        del owner[last]
    elif kind < 0.25 and isinstance(owner, list):
        owner.insert(last, dice.choice(HOSTILE))
    elif kind < 0.35 and isinstance(owner, dict):
        owner[dice.choice(["..", "__class__", "#", "$", "x"])] = owner.pop(last)
    elif kind < 0.4:
        deep = []
        for _ in range(dice.choice([50, 5000])):
            deep = [deep]
        owner[last] = deep
    else:
        owner[last] = dice.choice(HOSTILE)
    return document


def header_changed(content, dice):
    """A tensor file with another header."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.dumps(changed(json.loads(content[8 : 8 + length]), dice)).encode()
    except RecursionError:
        header = b"[" * 100_000
    said = dice.choice([len(header)] * 6 + [2**63, 0, len(content)])
    return said.to_bytes(8, "little") + header + content[8 + length :]


def case(files, dice):
    """The files with one thing changed."""
    files = dict(files)
    name = dice.choice(["state.json"] * 4 + [n for n in files if n != "state.json"])
    if name != "state.json":
        files[name] = header_changed(files[name], dice)
        return files
    try:
        text = json.dumps(changed(json.loads(files[name]), dice)).encode()
    except RecursionError:
        text = b'{"a":' * 100_000
    files[name] = text
    return files


def manifest_case(path, dice):
    """The manifest with one thing changed, signed."""
    sealed = json.loads((path / manifests.NAME).read_text())
    try:
        body = json.dumps(changed(sealed["manifest"], dice))
    except RecursionError:
        body = '{"a":' * 100_000
    sign(path, body)


def sign(path, body):
    text = json.dumps({"manifest": 0, "xxh3_128": manifests.sum_of(body.encode())})
    (path / manifests.NAME).write_text(text.replace('"manifest": 0', f'"manifest": {body}', 1))


def link_out(path):
    outside = path.parent.parent / "outside"
    if path.exists():
        path.rename(outside)  # the right content, only elsewhere
    else:
        outside.write_bytes(b"x")
    path.symlink_to(outside)


def link_to_itself(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def link_to_nothing(path):
    path.unlink(missing_ok=True)
    path.symlink_to("nothing")


def directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


STRANGERS = (link_out, link_to_itself, link_to_nothing, directory, pipe)


def extra_case(path, dice):
    """Something that nobody listed; the path of it, which must not be opened."""
    name = dice.choice(["x.safetensors", ".hidden", "..x", "state.json.safetensors", "a\nb", "é"])
    dice.choice(STRANGERS)(path / name)
    return path / name


def replaced_case(path, dice):
    """Something else in the place of a file, or of the manifest."""
    dice.choice(STRANGERS)(dice.choice(sorted(path.iterdir())))


def huge_case(path, dice):
    """A file that is longer than any disk; of some lengths, as far as this file system can."""
    victim = dice.choice(sorted(path.iterdir()))
    for length in (*dice.sample([2**62, 2**63 - 1, 7 << 60], 3), 1 << 43, 1 << 40):
        try:
            os.truncate(victim, length)
        except OSError:
            continue
        return


def elsewhere_case(path, dice):
    """A manifest, signed, that lists what lies elsewhere, with its right length and sum."""
    outside = path.parent.parent / "outside"
    outside.write_bytes(b"x")
    sealed = json.loads((path / manifests.NAME).read_text())
    files = sealed["manifest"]["files"]
    name = dice.choice(["../../outside", str(outside), "x/../../../outside", "..", ".", "../.."])
    files[name] = {"length": 1, "xxh3_128": manifests.sum_of(b"x")}
    if dice.random() < 0.5:
        del files[dice.choice([one for one in files if one != name])]
    sign(path, json.dumps(sealed["manifest"]))


def loop_case(path, _):
    """The checkpoint itself is a link that leads nowhere."""
    shutil.rmtree(path)
    path.symlink_to(path.name)


#: Each must be said to be damage.
DAMAGES = (replaced_case, replaced_case, huge_case, elsewhere_case, loop_case)


def main():
    count, seed, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    jobs.Link = Link
    jobs.atexit.register = lambda *_: None
    run = place / "first"
    (run / "checkpoints").mkdir(parents=True)
    pause(script(run))
    message, descriptor = Link.sent
    table = wire.table_in(memory.readable(descriptor), message.table)
    with memory.pieces([(descriptor, wire.places(table.files))]) as pieces:
        files = {name: bytes(piece) for name, piece in pieces.items()}
    usual, watched, strange, seen = settings.capture(), [None], [None], []

    def audit(event, arguments):
        if watched[0] is None:
            return
        if event == "open" and not isinstance(arguments[0], int):
            path = str(arguments[0])
            own = (str(watched[0]), "/proc/", sys.prefix, sys.base_prefix)
            if not path.startswith(own) or path == str(strange[0]):
                seen.append(f"opened {path}")
        elif event.startswith(BANNED):
            seen.append(f"{event} {arguments}")

    publish(run, files)
    script(run).restore_everything()  # what is imported late is imported here
    sys.addaudithook(audit)
    sound = refused = 0
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        run = place / str(number)
        (run / "checkpoints").mkdir(parents=True)
        path, expected, strange[0] = run / "checkpoints" / "000000001", None, None
        publish(run, case(files, dice) if number % 10 < 7 else files)
        if number % 10 == 9:
            manifest_case(path, dice)
        elif number % 10 == 8:
            dice.choice(DAMAGES)(path, dice)
            expected = DamagedError
        elif number % 10 == 7:
            strange[0] = extra_case(path, dice)
            expected = "sound"
        watched[0] = run
        try:
            job = script(run)
            job.restore_everything()
            sound += 1
            found = "sound"
        except (CkptdError, OSError) as error:
            refused += bool(str(error))
            found = type(error)
            if expected not in (None, found) or (expected and str(path) not in str(error)):
                seen.append(repr(error))
        except Exception as error:
            print(f"case {number} of seed {seed}: {type(error).__name__}: {error}", flush=True)
            raise
        finally:
            watched[0] = None
            settings.restore(usual)
            shutil.rmtree(run)
        if expected not in (None, found):
            seen.append(f"{found} instead of {expected}")
        if seen:
            print(f"case {number} of seed {seed}: {seen}", flush=True)
            sys.exit(1)
    assert refused + sound == count, "an error without a text"
    print(f"{count} cases, {refused} refused, {sound} read")


if __name__ == "__main__":
    main()
