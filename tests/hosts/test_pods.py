"""In a container, as in a pod of Kubernetes: ckptd is process 1 there, and its next one is too.

Process 1 has no default handlers of signals, inherits every orphan, and takes all down with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import BOUND_S, SCRIPTS, Workshop, wait_until
from launched import Launched, fake, no_leftovers  # noqa: F401  # for every test here

from ckptd.cli.status import look
from ckptd.host import hosts
from ckptd.host.host import Notice
from ckptd.supervisor.run import Run

needs_a_space = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare: a space of process ids of its own",
)
SPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def pod(workshop: Workshop, **environment: str) -> subprocess.Popen[str]:
    """A container with `ckptd launch` as its first process, and nothing else."""
    train = (sys.executable, str(SCRIPTS / "train.py"), str(workshop.path), "1")
    return subprocess.Popen(
        [*SPACE, *workshop.command("--every", "0.01"), *train],
        cwd=workshop.path,
        env=workshop.environment(**environment),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_pod_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is usual for pods holds for the time that is left, from the first SIGTERM on."""
    here = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "train-0"}
    host = hosts.recognised(here)
    assert host.described().startswith("Kubernetes pod train-0, 30 s from SIGTERM")
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    assert host.notice() == Notice(30.0, "the pod is to end", assumed=True)
    now_s = 112.0
    assert host.notice().left_s == 18.0
    assert host.returns
    assert not host.restarts


@pytest.mark.parametrize(
    ("options", "told"),
    [((), "the host leaves 30 s: the job has 25 s"), (("--grace", "600"), "SIGTERM: saving")],
)
def test_the_grace_of_a_pod(workshop: Workshop, options: tuple[str, ...], told: str) -> None:
    """The documented default holds, unless the user knows better."""
    launched = Launched(
        workshop, *fake("--deaf", "4"), options=options, KUBERNETES_SERVICE_HOST="10.0.0.1"
    )
    launched.wait_for("step 4")
    launched.signal(signal.SIGTERM).wait_for(told)
    look(Run(workshop.path / "runs" / "job"))  # the host's answer, if there is one, was heard
    assert ("the host leaves" in launched.told()) != bool(options)
    launched.kill()


@needs_a_space
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_pod_is_evicted(workshop: Workshop, tmp_path: Path, how: signal.Signals) -> None:
    """SIGTERM: saved, 75. SIGKILL: all of it dies at once. The next pod ends bitwise right."""
    plain = tmp_path / "plain"
    plain.mkdir()
    workshop.plain(sys.executable, str(SCRIPTS / "plain.py"), str(plain), "1")
    once = workshop.path / "once"
    first = pod(workshop, INTERRUPT="mid-epoch:WAIT", INTERRUPT_ONCE=str(once))
    wait_until(once.exists)
    wait_until(lambda: any(event["event"] == "durable" for event in workshop.journal()))
    (supervisor,) = psutil.Process(first.pid).children()
    inside = supervisor.children(recursive=True)
    assert inside
    supervisor.send_signal(how)
    _, said = first.communicate(timeout=BOUND_S)
    # `unshare` has no name of its own for a process 1 that was killed.
    assert (first.returncode == 75) == (how == signal.SIGTERM), said
    psutil.wait_procs(inside, timeout=BOUND_S)
    assert not [one for one in inside if one.is_running()]
    second = pod(workshop)
    _, said = second.communicate(timeout=BOUND_S)
    assert second.returncode == 0, said
    assert "attempt 2, from step" in said
    for name in ("result.safetensors", "metrics.csv"):
        assert (workshop.path / name).read_bytes() == (plain / name).read_bytes()
