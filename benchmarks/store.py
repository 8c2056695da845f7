"""`python -m benchmarks.store`: saving and restoring, beside other ways and the machine's limits.

A state of so many bytes in so many tensors is saved and restored in turn by ckptd, by `torch.save`,
by safetensors and by PyTorch's distributed checkpoints (DCP), all in this process, with an fsync of
each file; and the limits are measured in the same turn: one copy of the bytes in memory, one write
of them past the page cache with an fsync, one read of them past the page cache. Each figure is the
median over the turns; the last columns are ratios.

ckptd's worker and the supervisor's writer are the real ones; only the socket between them is left
out, so that the parts can be timed by themselves.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import gc
import json
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from ckptd import wire
from ckptd.host import memory
from ckptd.host.disk import RealDisk
from ckptd.store import store
from ckptd.worker import job as jobs

MIB, GIB = 1 << 20, 1 << 30
SIZES = {"64 MiB": 64 * MIB, "1 GiB": GIB, "4 GiB": 4 * GIB}
COUNTS = (20, 1_000, 10_000)
CHUNK = 16 * MIB


class Figures(dict[str, list[float]]):
    """Measured values by name, over the turns."""

    def note(self, name: str, value: float) -> None:
        self.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self[name])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - began)

    @contextmanager
    def weighed(self, name: str) -> Iterator[None]:
        """Bytes that went to the disk, and how much memory it took beyond what was there."""
        process = psutil.Process()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
        before, written = process.memory_info().rss, process.io_counters().write_bytes
        yield
        self.note(f"{name}: written", process.io_counters().write_bytes - written)
        peak = next(
            int(line.split()[1]) << 10
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        self.note(f"{name}: memory", max(0, peak - before))


class Link:
    """What a worker's link to its supervisor is to the job, with nobody at the other end."""

    orphaned = False
    durable = 0

    def __init__(self, address: str, hello: wire.Hello, arenas: Any, _: Any) -> None:  # noqa: ARG002
        checkpoints = sorted((Path(address) / "checkpoints").glob("[0-9]*"))
        newest = str(checkpoints[-1]) if checkpoints else None
        self.welcome = wire.Welcome("bench", address, 1, newest, None, 1)
        self.page = wire.StatusPage(memoryview(bytearray(wire.PAGE_BYTES)))
        self.arenas = arenas
        self.sent: tuple[wire.Snapshot, int] | None = None

    def send(self, message: object, descriptors: tuple[int, ...] = ()) -> bool:
        if isinstance(message, wire.Snapshot):
            if self.sent is not None:
                self.arenas.released(self.sent[0].generation)
            self.sent = message, descriptors[0]
        return True

    def forward_signals(self) -> None:
        """No signals here."""


class Ours:
    """ckptd: a job that holds a model, and the store."""

    def __init__(self, place: Path, model: nn.Module) -> None:
        self.place, self.model = place / "ckptd", model
        (self.place / "attempts").mkdir(parents=True)
        self.job = self.attached()

    def attached(self) -> jobs.LaunchedJob:
        jobs.Link = Link  # type: ignore[misc, assignment]
        job = jobs.LaunchedJob(str(self.place), {"model": self.model})
        atexit.unregister(job._at_exit)  # it is no script, and comes to no loop
        return job

    def save(self, figures: Figures) -> None:
        with figures.weighed("ckptd"):
            with figures.timed("ckptd: stall"):
                self.job.send_snapshot(keep=False)
            snapshot, descriptor = self.job._link.sent  # type: ignore[attr-defined]
            table = wire.table_in(memory.readable(descriptor), snapshot.table)
            with (
                figures.timed("ckptd: durable"),
                memory.pieces([(descriptor, wire.places(table.files))]) as files,
            ):
                store.publish_attempt(
                    RealDisk(),
                    self.place,
                    step=0,
                    attempt=1,
                    files=files,
                    outputs=[],
                    created=time.time(),
                )
        store.prune(RealDisk(), self.place / "checkpoints", 1)

    def restore(self) -> None:
        """What the supervisor does before a start, and the worker's part up to `attach`'s end."""
        newest, _ = store.newest(RealDisk(), self.place / "checkpoints")
        assert newest is not None, "it was saved"
        job = self.attached()
        job._reader.close()  # type: ignore[union-attr]


class Peers:
    """The other ways; each has `save` and `restore` for one model."""

    def __init__(self, place: Path, model: nn.Module) -> None:
        self.place, self.model = place, model

    def save_torch(self) -> None:
        path = self.place / "torch.pt"
        torch.save(self.model.state_dict(), path)
        sync(path)

    def restore_torch(self) -> None:
        self.model.load_state_dict(torch.load(self.place / "torch.pt"))

    def save_safetensors(self) -> None:
        path = self.place / "model.safetensors"
        save_file(dict(self.model.state_dict()), path)
        sync(path)

    def restore_safetensors(self) -> None:
        self.model.load_state_dict(load_file(self.place / "model.safetensors"))

    def save_dcp(self) -> None:
        dcp.save(self.model.state_dict(), checkpoint_id=self.place / "dcp", no_dist=True)

    def restore_dcp(self) -> None:
        state = self.model.state_dict()
        dcp.load(state, checkpoint_id=self.place / "dcp", no_dist=True)
        self.model.load_state_dict(state)

    def save_dcp_async(self) -> Any:
        """DCP's asynchronous save; what has to be waited for."""
        state = self.model.state_dict()
        return dcp.async_save(state, checkpoint_id=self.place / "dcp-async", no_dist=True)


class Limits:
    """One copy, one write and one read of the bytes, as fast as this machine does them."""

    def __init__(self, place: Path, length: int) -> None:
        self.path, self.length = place / "raw", length
        # Far more than any cache, and less than would not fit beside the rest.
        self.part = part = min(length, GIB)
        self.source = torch.ones(part, dtype=torch.uint8)
        self.target = torch.ones_like(self.source)
        self.memory = mmap.mmap(-1, part)
        self.view = memoryview(self.memory)
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(self.memory)), 1, part)

    def copy(self) -> None:
        for _ in range(self.length // self.part):
            self.target.copy_(self.source)

    def write(self) -> None:
        self.path.unlink(missing_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        self._each(lambda at: os.pwrite(descriptor, self._chunk(at), at))
        os.fsync(descriptor)
        os.close(descriptor)

    def read(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        self._each(lambda at: os.preadv(descriptor, [self._chunk(at)], at))
        os.close(descriptor)

    def _chunk(self, at: int) -> memoryview:
        return self.view[at % self.part : at % self.part + CHUNK]

    def _each(self, do: Callable[[int], object]) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(do, range(0, self.length, CHUNK)))


def give_back() -> None:
    """Return to the system what was freed, so that one way does not use up another one's memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def sync(path: Path) -> None:
    """Make a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Have the kernel drop what it holds of all files under a path."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with file.open("rb") as one:
                os.fsync(one.fileno())
                os.posix_fadvise(one.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_of(length: int, count: int) -> nn.Module:
    """A module of so many bytes in so many parameters."""
    model = nn.Module()
    for i in range(count):
        model.register_parameter(f"weight{i}", nn.Parameter(torch.rand(length // 4 // count)))
    return model


def measure(place: Path, length: int, count: int, turns: int) -> Figures:
    """All figures for one state."""
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    figures = Figures()
    model = model_of(length, count)
    ours, peers, limits = Ours(place, model), Peers(place, model), Limits(place, length)
    for turn in range(-2, turns):  # two arenas take turns, and both are new at first
        now = Figures()
        with now.timed("copy"):
            limits.copy()
        ours.save(now)
        with now.timed("write"):
            limits.write()
        with now.timed("read"):
            limits.read()
        save(peers, now)
        restore(place, ours, peers, now)
        if turn >= 0:
            for name, values in now.items():
                figures.note(name, *values)
    return figures


def save(peers: Peers, now: Figures) -> None:
    """Save in each other way."""
    for name, one in (
        ("torch.save", peers.save_torch),
        ("safetensors", peers.save_safetensors),
        ("DCP", peers.save_dcp),
    ):
        give_back()
        with now.weighed(name), now.timed(f"{name}: durable"):
            one()
        now.note(f"{name}: stall", now[f"{name}: durable"][-1])
    give_back()
    with now.weighed("DCP async"), now.timed("DCP async: durable"):
        with now.timed("DCP async: stall"):
            waiting = peers.save_dcp_async()
        waiting.result()
    del waiting


def restore(place: Path, ours: Ours, peers: Peers, now: Figures) -> None:
    """Restore in each way, from the disk and from the page cache."""
    for name, path, one in (
        ("ckptd", "ckptd", ours.restore),
        ("torch.save", "torch.pt", peers.restore_torch),
        ("safetensors", "model.safetensors", peers.restore_safetensors),
        ("DCP", "dcp", peers.restore_dcp),
    ):
        give_back()
        forget(place / path)
        with now.timed(f"{name}: cold"):
            one()
        give_back()
        with now.timed(f"{name}: warm"):
            one()


WAYS = ("ckptd", "torch.save", "safetensors", "DCP", "DCP async")


def rows(figures: Figures, length: int) -> list[list[str]]:
    """The table's rows for one state."""
    copy, write, read = (figures.median(name) for name in ("copy", "write", "read"))
    limit = ["one copy, write, read", f"{copy:.3f}", f"{write:.3f}", f"{read:.3f}", "", "", ""]
    found = [limit]
    for way in WAYS:
        stall, durable = (figures.median(f"{way}: {what}") for what in ("stall", "durable"))
        cold = warm = ""
        if f"{way}: cold" in figures:
            seconds = figures.median(f"{way}: cold")
            cold = f"{seconds:.3f} ({seconds / read:.2f} x)"
            warm = f"{figures.median(f'{way}: warm'):.3f}"
        found.append(
            [
                way,
                f"{stall:.3f} ({stall / copy:.2f} x)",
                f"{durable:.3f} ({durable / write:.2f} x)",
                cold,
                warm,
                f"{figures.median(f'{way}: written') / length:.2f} x",
                f"{figures.median(f'{way}: memory') / length:.2f} x",
            ]
        )
    return found


def targets(figures: Figures, length: int, count: int) -> Iterator[tuple[str, float, float]]:
    """What it should be: words, the ratio (or milliseconds), the most that it may be."""
    median = figures.median
    stall, durable = median("ckptd: stall"), median("ckptd: durable")
    if length >= GIB:
        yield "stall / one copy", stall / median("copy"), 1.15
        yield "durable / one direct write", durable / median("write"), 1.15
        yield "durable / torch.save + fsync", durable / median("torch.save: durable"), 1 / 3
        yield "durable / DCP", durable / median("DCP: durable"), 1 / 3
        yield "cold restore / one read", median("ckptd: cold") / median("read"), 1.2
    if length == GIB:
        yield "stall / DCP async's stall", stall / median("DCP async: stall"), 0.1
    if count == max(COUNTS):
        yield "ms beyond one copy", 1e3 * (stall - median("copy")), 30


def main() -> None:
    """Measure, and print the tables."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest state only, two turns")
    parser.add_argument("--sizes", default=",".join(SIZES), help="which of: %(default)s")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="of tensors")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--dir", type=Path, help="where to write (default: the temporary directory)"
    )
    parser.add_argument("--json", type=Path, help="write all figures there as well")
    args = parser.parse_args()
    sizes, turns = (["64 MiB"], 2) if args.quick else (args.sizes.split(","), args.turns)
    console, kept = Console(width=140), {}
    for size in sizes:
        for count in map(int, args.counts.split(",")):
            # A process for each state: what one leaves in memory does not hamper the next.
            with (
                tempfile.TemporaryDirectory(prefix="ckptd-bench-", dir=args.dir) as place,
                multiprocessing.get_context("spawn").Pool(1) as pool,
            ):
                figures = pool.apply(measure, (Path(place), SIZES[size], count, turns))
            kept[f"{size} in {count}"] = figures
            table = Table(title=f"{size} in {count:,} tensors", box=None, title_justify="left")
            for column in ("seconds", "stall", "durable", "cold", "warm", "written", "memory"):
                table.add_column(column, justify="left" if column == "seconds" else "right")
            for row in rows(figures, SIZES[size]):
                table.add_row(*row)
            console.print(table)
            for words, value, most in targets(figures, SIZES[size], count):
                verdict = "met" if value <= most else "MISSED"
                console.print(f"  {words}: {value:.3g}, at most {most:.3g}: {verdict}")
            console.print()
    if args.json:
        args.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
