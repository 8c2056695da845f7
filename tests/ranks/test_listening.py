"""When a supervisor listens for ranks on other machines, and under which name."""

from __future__ import annotations

import os

import pytest
from conftest import Workshop
from launched import Launched, no_leftovers  # noqa: F401  # a fixture for every test here

from ckptd import wire
from ckptd.cli import launch
from ckptd.errors import UsageError
from ckptd.host import hosts
from ckptd.host.host import Host, Plain

SLURM = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
OWN = os.uname().nodename


def slurm(**more: str) -> Host:
    return hosts.recognised({**SLURM, **more})


@pytest.mark.parametrize(
    ("option", "host", "listens"),
    [
        ("auto", Plain(), None),
        ("auto", slurm(), None),
        ("auto", slurm(SLURM_JOB_NUM_NODES="1"), None),
        ("auto", slurm(SLURM_JOB_NUM_NODES="2"), ("n1", 0)),
        ("auto", slurm(SLURM_NNODES="3"), ("n1", 0)),
        ("auto", hosts.recognised({"SLURM_JOB_ID": "7", "SLURM_NNODES": "3"}), (OWN, 0)),
        ("off", slurm(SLURM_JOB_NUM_NODES="2"), None),
        ("n7-ib", Plain(), ("n7-ib", 0)),
        ("n7-ib:7000", slurm(SLURM_JOB_NUM_NODES="2"), ("n7-ib", 7000)),
        ("fe80::1", Plain(), ("fe80::1", 0)),
    ],
)
def test_where(option: str, host: Host, listens: tuple[str, int] | None) -> None:
    """Where the job has several nodes, or the user says so; under the node's own name."""
    assert launch._listens(option, host) == listens


@pytest.mark.parametrize("option", ["", ":1", "a,b", "a:b", "a:70000", "a:-1"])
def test_what_is_no_place(option: str) -> None:
    """Is an error that says what is one."""
    with pytest.raises(UsageError, match="it is auto, off, HOST or HOST:PORT"):
        launch._listens(option, Plain())


def test_the_command_is_told(workshop: Workshop) -> None:
    """Each attempt has an invitation with a secret of its own; without an option there is none,
    also within another supervisor's command."""
    argv = ("sh", "-c", "echo remote=$CKPTD_REMOTE; exit 3")
    options = ("--listen", "here", "--max-restarts", "1")
    job = Launched(workshop, *argv, options=options)
    job.ends()
    told = [line.removeprefix("remote=") for line in job.output if line.startswith("remote=")]
    first, second = map(wire.Invitation.read, told[:2])
    assert (first.host, first.port) == (second.host, second.port)
    assert first.host == "here"
    assert first.secret != second.secret
    other = Launched(
        workshop, *argv, options=("--fresh", "--max-restarts", "0"), CKPTD_REMOTE="outer"
    )
    other.ends()
    assert "remote=" in other.output
