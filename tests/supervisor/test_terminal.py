"""Whoever reads what we write may be slow, stuck or gone: the job does not notice."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import BOUND_S, Workshop, wait_until
from launched import checkpoints, fake, no_leftovers  # noqa: F401  # a fixture for every test here

from ckptd.supervisor import outlet
from ckptd.supervisor.outlet import Hand, Outlet

NOISE = 1 << 20


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe's two ends."""
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


def launch(workshop: Workshop, *options: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*workshop.command(*options), *fake("--noise", str(NOISE))],
        cwd=workshop.path,
        env=workshop.environment(),
        **streams,
    )


def log_of(workshop: Workshop) -> Path:
    return workshop.path / "runs/job/log"


@pytest.mark.parametrize("last_words", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal(workshop: Workshop, last_words: int) -> None:
    """The progress line stands in a terminal that is closed: the job is saved all the same."""
    master, slave = pty.openpty()
    launched = launch(workshop, stderr=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    drawn = b""
    while not re.search(rb"step [1-9]", drawn):  # a worker is attached
        drawn += os.read(master, 1 << 16)
    os.close(master)
    launched.send_signal(last_words)
    assert launched.wait(BOUND_S) == 75
    assert checkpoints(workshop)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nobody_reads(workshop: Workshop, pipe: tuple[int, int], stream: str) -> None:
    """A full pipe stops nothing: the log has all, and a stop saves the job within its grace."""
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    # Full from the beginning, so that also the first word finds nobody.
    os.set_blocking(pipe[1], False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe[1], bytes(1 << 16))
    os.set_blocking(pipe[1], True)
    said = workshop.path / "said"
    with said.open("wb") as file:
        launched = launch(workshop, "--grace", "20", **{stream: pipe[1], other: file.fileno()})
    wait_until(lambda: log_of(workshop).exists() and log_of(workshop).stat().st_size > 100 * NOISE)
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(BOUND_S) == 75
    lines = log_of(workshop).read_bytes().splitlines()
    steps = [int(line.split()[1]) for line in lines if line.startswith(b"step ")]
    assert steps == list(range(1, steps[-1] + 1))
    assert checkpoints(workshop) == [steps[-1]]
    if stream == "stdout":
        assert b"standard output" in said.read_bytes()


def test_one_terminal_for_both(workshop: Workshop) -> None:
    """The line of progress never lands inside the job's own output, nor the other way round."""
    master, slave = pty.openpty()
    command = [*workshop.command(), *fake("--pace", "0.02", "--total", "200")]
    launched = subprocess.Popen(
        command, cwd=workshop.path, env=workshop.environment(), stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = b""
    while chunk := _read(master):
        shown += chunk
    os.close(master)
    assert launched.wait(BOUND_S) == 0
    assert shown.count(b"\x1b[Kckptd: attached") > 1, "nothing was drawn"
    left = re.sub(rb"\r\x1b\[Kckptd: [^\r\n]*\r\x1b\[K", b"", shown)
    lines = left.decode().splitlines()
    assert [line for line in lines if "step" in line and not line.startswith("ckptd")] == [
        f"step {number}" for number in range(1, 201)
    ]


def _read(master: int) -> bytes:
    try:
        return os.read(master, 1 << 16)
    except OSError:
        return b""  # the last process that had the terminal open ended


def test_what_does_not_fit(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped and counted; what fitted arrives unchanged and in order."""
    monkeypatch.setattr(outlet, "WAITING_BYTES_MAX", 1 << 20)
    hand = Hand()
    out = Outlet(pipe[1], hand, pytest.fail)
    taken = b""
    for number in range(100):
        chunk = bytes([number]) * (1 << 16)
        if out.put(chunk):
            taken += chunk
    assert not hand.drain(0.01)
    assert len(taken) >= 1 << 20
    assert out.dropped == (100 << 16) - len(taken)
    came = b""
    while len(came) < len(taken):
        came += os.read(pipe[0], 1 << 16)
    assert came == taken
    assert hand.drain(BOUND_S)
    assert out.put(b"again"), "there is room again"
    assert hand.drain(BOUND_S)


def test_a_stream_that_does_not_block(pipe: tuple[int, int]) -> None:
    """A terminal that another program made non-blocking loses nothing, whatever its number."""
    high = fcntl.fcntl(pipe[1], fcntl.F_DUPFD, 1024)
    os.set_blocking(high, False)
    hand, chunk = Hand(), os.urandom(1 << 20)
    Outlet(high, hand, pytest.fail).put(chunk)
    came = b""
    while len(came) < len(chunk):
        threading.Event().wait(0.001)
        came += os.read(pipe[0], 1 << 16)
    assert came == chunk
    assert hand.drain(BOUND_S)
    os.close(high)
