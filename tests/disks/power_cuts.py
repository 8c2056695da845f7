"""Cuts the power under a writer again and again, and looks each time at what is left.

    power_cuts.py FILE_SYSTEM CUTS SEED publisher [FORGET]
    power_cuts.py FILE_SYSTEM CUTS SEED launch

The writer is publisher.py (ckptd's store alone) or a whole `ckptd launch`. The power goes at a disk
operation drawn at random; the drive (drive.py) keeps a random part of what was not flushed. After
the power is back the file system recovers by itself; then a loss is

- a checkpoint that was reported durable and is not there, unless newer ones are;
- anything under a checkpoint's name that does not verify;
- an output file that is shorter than the newest checkpoint counts on.

The writer goes on with what is left. Prints one JSON object: cuts, losses, what the first ones
were, receipts, cached sectors and those of them that the drive kept.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
from drive import Drive, private_mounts

from ckptd.errors import CkptdError, DamagedError
from ckptd.host.disk import RealDisk
from ckptd.store import retention, store
from ckptd.supervisor import server
from ckptd.supervisor.run import Run

HERE = Path(__file__).parent
OPERATIONS_MAX = {"publisher": 220, "launch": 500}
BOUND_S = 60
POLL_S = 0.01


class Publisher:
    """publisher.py; its receipts are the lines that it prints."""

    def __init__(self, files, forget) -> None:
        self.run = files / "run"
        self.run.mkdir(exist_ok=True)
        (self.run / "attempts").mkdir(exist_ok=True)
        self.receipts = []
        argv = [sys.executable, str(HERE / "publisher.py"), str(self.run), *forget]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.receipts.append(int(line.split()[1]))

    def look(self):
        pass

    def end(self):
        """Kill it; every receipt that it gave is known then."""
        self.process.kill()
        _, errors = self.process.communicate()
        self._reader.join()
        # Only a disk that is gone may end it.
        assert self.process.returncode in (-9, 74), errors.decode()


class Launch:
    """A whole `ckptd launch` of a worker with a large state; its receipts: what it answers."""

    def __init__(self, files, forget) -> None:
        self.run = files / "run"
        self.receipts = []
        argv = [sys.executable, "-m", "ckptd", "launch", "--dir", str(files), "--name", "run"]
        argv += [
            "--every",
            "0.02",
            "--keep",
            "2",
            "--",
            sys.executable,
            str(HERE / "heavy_worker.py"),
        ]
        self.process = subprocess.Popen(
            argv, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def look(self):
        with suppress(OSError, CkptdError):
            holder = Run(self.run).supervisor()
            if holder is not None and holder.pid == self.process.pid:
                step = server.ask(holder.socket, "status").facts["durable step"]
                if step is not None:
                    self.receipts.append(int(step))

    def end(self):
        whole = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        for process in whole:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(whole[:-1], timeout=BOUND_S)
        self.process.wait()


WRITERS = {"publisher": Publisher, "launch": Launch}


def cut_once(drive, kind, forget, rng):
    """One cut, the power back on; the receipts and the drive's figures."""
    drive.cut(rng.randrange(1 << 30), at=rng.randint(1, OPERATIONS_MAX[kind]))
    writer = WRITERS[kind](drive.files, forget)
    until_s = time.monotonic() + BOUND_S
    while not drive.seen()["dead"]:
        assert time.monotonic() < until_s, "the writer writes nothing"
        writer.look()
        time.sleep(POLL_S)
    writer.end()
    figures = drive.seen()
    drive.off()
    drive.on()
    return writer.receipts, figures


def lost(run, promised):
    """What was lost; "" when nothing was."""
    disk = RealDisk()
    names = retention.newest_first(disk.names(run / "checkpoints"))
    try:
        steps = [store.verify(disk, run / "checkpoints" / name).step for name in names]
    except DamagedError as error:
        return str(error)
    if max(steps, default=0) < promised:
        return f"step {promised} was reported durable; there are {steps}"
    if names and (run / "output").exists():
        state = (run / "checkpoints" / names[0] / "state.json").read_bytes()
        expected = msgspec.json.decode(state)["output"]
        if (run / "output").stat().st_size < expected:
            return f"the output has less than the {expected} bytes that step {steps[0]} counts on"
    return ""


def new_drive(path, file_system):
    """A drive with an empty file system, all of it on the medium."""
    drive = Drive(Path(tempfile.mkdtemp(dir=path)), file_system)
    drive.off()
    drive.on()
    return drive


def main():
    file_system, cuts, seed, kind, *forget = sys.argv[1:]
    rng = random.Random(int(seed))
    private_mounts()
    figures, losses, receipts, promised = Counter(), [], 0, 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as path:
        drive = new_drive(Path(path), file_system)
        try:
            for number in range(int(cuts)):
                got, seen = cut_once(drive, kind, forget, rng)
                figures.update(seen)
                receipts += len(set(got))
                promised = max([promised, *got])
                loss = lost(drive.files / "run", promised)
                if loss:
                    losses.append(f"cut {number + 1}: {loss}")
                    # What is damaged can't be gone on with: a new disk.
                    drive.off()
                    drive = new_drive(Path(path), file_system)
                    promised = 0
        finally:
            drive.off()
    account = {"cuts": int(cuts), "losses": len(losses), "first": losses[:3], "receipts": receipts}
    print(json.dumps({**account, "cached": figures["cached"], "kept": figures["kept"]}))


if __name__ == "__main__":
    main()
