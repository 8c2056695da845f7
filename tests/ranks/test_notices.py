"""Signals that several ranks pass on in the same instant."""

from __future__ import annotations

import signal
import sys

import pytest
from conftest import Workshop, wait_until
from launched import Launched, no_leftovers  # noqa: F401  # a fixture for every test

pytestmark = pytest.mark.real

#: A rank that attaches, passes a signal on when it is told to, and then does nothing any more.
RANK = """
import os, pathlib, socket, sys, time
from ckptd import wire
rank = int(sys.argv[1])
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect(os.environ[wire.ENV_SOCKET])
link.send(wire.encode(wire.Hello(wire.PROTOCOL, os.getpid(), rank, 3, {})))
link.recv(wire.MESSAGE_BYTES_MAX)
pathlib.Path(f"attached-{rank}").touch()
while not pathlib.Path("now").exists():
    time.sleep(0.01)
link.send(wire.encode(wire.Notice(15)))
pathlib.Path(f"noticed-{rank}").touch()
time.sleep(1000)
"""
#: The same, but all of the ranks in one process.
MANY = """
import os, pathlib, socket, sys, time
from ckptd import wire
ranks = int(sys.argv[1])
links = []
for rank in range(ranks):
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.connect(os.environ[wire.ENV_SOCKET])
    link.send(wire.encode(wire.Hello(wire.PROTOCOL, os.getpid(), rank, ranks, {})))
    link.recv(wire.MESSAGE_BYTES_MAX)
    links.append(link)
pathlib.Path("attached").touch()
while not pathlib.Path("now").exists():
    time.sleep(0.01)
for link in links:
    link.send(wire.encode(wire.Notice(15)))
pathlib.Path("noticed").touch()
time.sleep(1000)
"""
ALL = 'for rank in 0 1 2; do "$0" -c "$1" $rank & done; wait'


def test_they_come_at_once(workshop: Workshop) -> None:
    """Those that were heard out together with the first one are not waited for once more."""
    argv = ("sh", "-c", ALL, sys.executable, RANK)
    job = Launched(workshop, *argv, options=("--grace", "1"))
    wait_until(lambda: len(list(workshop.path.glob("attached-*"))) == 3)
    job.signal(signal.SIGSTOP)
    (workshop.path / "now").touch()
    wait_until(lambda: len(list(workshop.path.glob("noticed-*"))) == 3)
    job.signal(signal.SIGCONT)
    assert job.ends() == 75, job.told()
    job.wait_for("SIGTERM: saving the job")
    job.wait_for("no safe point was reached")


def test_hundreds_at_once(workshop: Workshop) -> None:
    """However many there are, each is heard: none within the hearing of the one before it."""
    job = Launched(workshop, sys.executable, "-c", MANY, "300", options=("--grace", "1"))
    wait_until((workshop.path / "attached").exists)
    job.signal(signal.SIGSTOP)
    (workshop.path / "now").touch()
    wait_until((workshop.path / "noticed").exists)
    job.signal(signal.SIGCONT)
    assert job.ends() == 75, job.told()
    job.wait_for("no safe point was reached")
