"""A real Slurm on this machine: munge, a controller and some nodes, for the time of the tests.

Each node is a slurmd of its own on the loopback interface. `tracker` is how Slurm finds the
processes of a job, which decides who gets its signals: "linuxproc" all descendants of the batch
process, "cgroup" that process alone, as on most clusters.

Debian: slurmctld, slurmd, slurm-client, munge.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import BOUND_S, Workshop

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sbatch", "scancel", "sinfo")
FREEZER = Path("/sys/fs/cgroup/freezer")
TRACKERS = ("linuxproc", "cgroup")
#: Seconds; Slurm grants at least 5 between SIGTERM and SIGKILL.
KILL_WAIT_S = 20
GRACE_S = 15
_POLL_S = 0.05
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not(tracker: str) -> str | None:
    """Why no cluster can be had here; None: it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "slurmd needs root"
    if tracker == "cgroup" and not os.access(FREEZER / "tasks", os.W_OK):
        return f"no cgroup v1 freezer at {FREEZER}; Debian 12's slurmd needs systemd for v2"
    return None


class Cluster:
    """A running Slurm.

    Args:
        tracker: one of TRACKERS.
    """

    def __init__(self, tracker: str) -> None:
        self.tracker = tracker
        # Unix sockets have short names, and the tests' own directories are deep.
        self.path = Path(tempfile.mkdtemp(prefix="ckptd-slurm-", dir="/tmp"))
        self.path.chmod(0o755)
        self.nodes = [f"{self.path.name[-6:].replace('_', 'x')}n{i}" for i in (1, 2)]
        self.conf = self.path / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._key = self.path / "key"
        self._key.touch(0o600)
        self._key.write_bytes(os.urandom(128))
        for name in ("state", "spool", "run"):
            (self.path / name).mkdir()

    # -------------------------------------------------------------- up and down

    def up(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        socket_path = self.path / "munge"
        self._start(
            "munged",
            *("--foreground", "--force", f"--socket={socket_path}", f"--key-file={self._key}"),
            *(f"--pid-file={self.path}/run/munged.pid", f"--seed-file={self.path}/run/seed"),
            *(f"--log-file={self.path}/munged.log", "--origin=127.0.0.1"),
        )
        wait_until(socket_path.exists, "munge's socket", self.told)
        for _ in range(3):  # somebody else may take a port between our look and the daemons'
            self._configure(_free_ports(1 + len(self.nodes)))
            self._start("slurmctld", "-D", "-f", str(self.conf))
            for node in self.nodes:
                self.start_node(node)
            wait_until(lambda: self._ended() or self._idle(), "idle nodes", self.told)
            if not self._ended():
                return
            for name in [name for name in self._daemons if name != "munged"]:
                self._stop(name)
        raise AssertionError(f"Slurm does not start: {self.told()}")

    def down(self) -> None:
        """End the jobs and everything that was started."""
        for name in ("slurmctld", *(f"slurmd-{node}" for node in self.nodes), "munged"):
            if name in self._daemons:
                self._stop(name)
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self.nodes:
            top = FREEZER / f"slurm_{node}"
            for path, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):  # a process of it is about to be gone
                    Path(path).rmdir()
        shutil.rmtree(self.path, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start("slurmd", "-D", "-f", str(self.conf), "-N", node, name=f"slurmd-{node}")

    def kill_slurmd(self, node: str) -> None:
        """The node's slurmd dies; its jobs' processes go on, and nobody looks after them."""
        self._daemons.pop(f"slurmd-{node}").kill()

    def _start(self, program: str, *options: str, name: str | None = None) -> None:
        found = shutil.which(program, path=_PATH)
        assert found is not None, "seen by why_not"
        with (self.path / f"{name or program}.out").open("ab") as output:
            self._daemons[name or program] = subprocess.Popen(
                [found, *options],
                cwd=self.path,
                env={"PATH": _PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        helpers = psutil.Process(daemon.pid).children() if daemon.poll() is None else []
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        if name == "slurmctld":  # its script runner
            for process in helpers:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _ended(self) -> bool:
        return any(daemon.poll() is not None for daemon in self._daemons.values())

    def _idle(self) -> bool:
        done = self._client("sinfo", "-h", "-N", "-p", "high", "-o", "%N=%T")
        return sorted(done.stdout.split()) == sorted(f"{node}=idle" for node in self.nodes)

    def _configure(self, ports: Sequence[int]) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = ",".join(self.nodes)
        settings = {
            "ClusterName": "ckptd",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            # A requeued job is held back until its credential is over.
            "AuthInfo": f"socket={self.path}/munge,cred_expire=5",
            "StateSaveLocation": self.path / "state",
            "SlurmdSpoolDir": self.path / "spool/%n",
            "SlurmctldPidFile": self.path / "run/slurmctld.pid",
            "SlurmdPidFile": self.path / "run/slurmd-%n.pid",
            "SlurmctldLogFile": self.path / "slurmctld.log",
            "SlurmdLogFile": self.path / "slurmd-%n.log",
            "ProctrackType": f"proctrack/{self.tracker}",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",  # PreemptParameters= from 23 on
            "KillWait": KILL_WAIT_S,
            "MessageTimeout": 5,
            "SlurmctldTimeout": 30,
            "SlurmdTimeout": 10,
            "ReturnToService": 2,
            "SlurmdParameters": "config_overrides",  # nodes may have more processors than we do
            "PropagateResourceLimitsExcept": "MEMLOCK",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
            "RealMemory=1024 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        low = f"Nodes={nodes} PriorityTier=1 PreemptMode=REQUEUE MaxTime=INFINITE DefaultTime=60"
        lines += [
            f"PartitionName=low Default=YES GraceTime=0 {low}",
            f"PartitionName=graced GraceTime={GRACE_S} {low}",
            f"PartitionName=cancelled GraceTime=0 {low}".replace("=REQUEUE", "=CANCEL"),
            f"PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        if self.tracker == "cgroup":
            (self.path / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        else:
            (self.path / "cgroup.conf").write_text("")

    # -------------------------------------------------------------- what a user does

    def _client(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CKPTD", "SLURM"))}
        return subprocess.run(
            argv,
            env={**kept, "PATH": f"{kept['PATH']}:{_PATH}", "SLURM_CONF": str(self.conf)}
            | environment,
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )

    def do(self, *argv: str, **environment: str) -> str:
        """Run one of Slurm's commands; what it prints."""
        done = self._client(*argv, **environment)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.do("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, **expected: str) -> dict[str, str]:
        """Wait until scontrol says this of a job."""
        shown: dict[str, str] = {}

        def is_so() -> bool:
            shown.update(self.show(job))
            return all(shown.get(key) in value.split("|") for key, value in expected.items())

        wait_until(is_so, f"{expected} of job {job}", lambda: f"{shown}\n{self.told()}")
        return shown

    def start_requeued(self, job: str, restarts: int = 1) -> None:
        """Wait until a job is back in the queue, and skip the time that it would be held there.

        Not all of it: a node refuses a start in the second in which it killed the job.
        """
        self.wait_for(job, JobState="PENDING", Restarts=str(restarts))
        self.do("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def processes(self, job: str | None = None) -> list[psutil.Process]:
        """All processes of one job, or of all jobs of this cluster, wherever they went."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == str(self.conf)
                of = environment.get("SLURM_JOB_ID")
                if ours and of is not None and job in (None, of):
                    found.append(process)
        return found

    def clear(self) -> None:
        """Cancel every job and wait until nothing of any is left."""
        self.do("scancel", "--full", "--signal=KILL", "--user=root")
        self.do("scancel", "--user=root")
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for node in self.nodes:
            if f"slurmd-{node}" not in self._daemons:
                self.start_node(node)
            self._client("scontrol", "update", f"NodeName={node}", "State=RESUME")
        wait_until(self._idle, "idle nodes", self.told)

    def told(self) -> str:
        """The ends of the daemons' logs."""
        logs = sorted(self.path.glob("slurm*.log")) or sorted(self.path.glob("*.out"))
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            for log in logs
        )


class Batch:
    """One batch job that trains under ckptd.

    Attributes:
        path: its directory.
        once: exists as soon as the script waits for its interruption.
    """

    def __init__(self, cluster: Cluster, workshop: Workshop, *, body: str) -> None:
        self.cluster, self.workshop, self.path = cluster, workshop, workshop.path
        self.script = self.path / "job.sbatch"
        self.script.write_text("#!/bin/bash\n" + body)
        self.job = ""

    def submit(self, *options: str, **environment: str) -> str:
        """Submit it; its id."""
        environment = self.workshop.environment(**environment)
        self.job = self.cluster.do(
            *("sbatch", "--parsable", "--requeue", "--open-mode=append", *options),
            *(f"--output={self.path}/out.%j", f"--chdir={self.path}", str(self.script)),
            **environment,
        )
        return self.job

    def told(self) -> str:
        """All output of all jobs."""
        return "\n".join(path.read_text() for path in sorted(self.path.glob("out.*")))

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        wait_until(happened, what, lambda: f"{self.told()}\n{self.cluster.told()}")


def wait_until(happened: Callable[[], bool], what: str, told: Callable[[], str]) -> None:
    """Wait for an event; fails with what is known when it does not come."""
    until_s = time.monotonic() + BOUND_S / 2
    while not happened():
        assert time.monotonic() < until_s, f"{what} never came:\n{told()}"
        time.sleep(_POLL_S)


def _free_ports(count: int) -> list[int]:
    dice = random.SystemRandom()
    for _ in range(200):
        ports = dice.sample(range(18000, 31000), count)
        sockets = []
        try:
            for port in ports:
                sockets.append(one := socket.socket())
                one.bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return ports
    pytest.fail("no free ports")
