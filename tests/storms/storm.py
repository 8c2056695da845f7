"""A storm: runs of train.py that are killed with SIGKILL again and again until they have finished.

    python storm.py        reads one storm a line, writes one account a line

A storm is {"seed": …, "kills": …, "path": an empty directory}. Importing torch costs more than all
else of a short life, so it is imported once, here, and both `ckptd launch` and its command are
forks of this process instead of new programs. What stands for `exec` (`_become`) is the only thing
that is not the product's own: descriptors, sessions, signals, pipes, sockets, locks and files are
real, and so are the deaths.

Who dies: the worker, the supervisor, or both; and a worker that has lost its supervisor may be
killed while it saves itself. When: after a time drawn at random; before, in the middle of or after
one of the disk operations of a process, drawn at random (it writes, publishes or prunes then); at
one of the tensors that a resuming worker reads. Instants decide what is hit, not what is expected.

After every kill, what was reported durable must be there and verify: the journal's events, and what
the supervisor answered when it was asked right before. A worker that was left alone must have lost
no step that it had printed. Every run must end in the plain run's bytes.
"""

import atexit
import ctypes
import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import train

from ckptd.cli import launch  # noqa: F401  # `main` would import it in every fork
from ckptd.cli import main as command_line
from ckptd.errors import CkptdError, DamagedError
from ckptd.host import children
from ckptd.host.disk import RealDisk
from ckptd.store import retention, store
from ckptd.supervisor import journal, server
from ckptd.supervisor.run import Run
from ckptd.worker.snapshot import Reader

BOUND_S = 120
POLL_S = 0.002
KEEP = 2
OPTIONS = ["--every", "0.03", "--keep", str(KEEP), "--max-restarts", "1000000"]
LIFE_S, REAL_LIFE_S = 0.25, 8.0  # of the lives that end by the clock: at most so long
SUBREAPER = 36
INTERRUPTED = 75
WRITES = (
    *("make_directory", "write", "link", "sync", "sync_directory"),
    *("rename", "remove", "remove_tree"),
)
#: What a plan may make deadly.
REAL = {
    **{(RealDisk, name): getattr(RealDisk, name) for name in WRITES},
    (Reader, "tensor"): Reader.tensor,
}


class WrongError(Exception):
    """A promise was broken."""


# ------------------------------------------------------------------ processes by fork


def _become(work, *, environment, cwd, output, kept=()):
    """In a fork: be a new program, as far as anyone can tell; never returns."""
    code = 1
    try:
        gc.freeze()  # what the parent had open is not ours to close when it is collected
        atexit._clear()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in [(output, 1), (output, 2), (null, 0)]:
            os.dup2(source, target)
        begin = 3
        for descriptor in [*sorted(kept), 1 << 16]:
            os.closerange(begin, descriptor)
            begin = descriptor + 1
        for descriptor in kept:
            os.set_inheritable(descriptor, True)
        # Not closed with the parent's objects, which go when these replace them.
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "wb", closefd=False), write_through=True)
            for number in (1, 2)
        )
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        try:
            work()
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else end.code
        except BaseException as error:  # noqa: BLE001  # as the interpreter does
            traceback.print_exc()
            sys.last_value = error
        atexit._run_exitfuncs()
    finally:
        os._exit(code)


class ForkedCommand:
    """What `subprocess.Popen` is to `ckptd.host.children.Child`."""

    def __init__(
        self, argv, *, cwd, env, stdin, stdout, stderr, pass_fds, start_new_session
    ) -> None:
        self._code = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _become(
                partial(_worker, argv[-3:]),
                environment=env,
                cwd=cwd,
                output=stdout,
                kept=pass_fds,
            )

    def poll(self):
        if self._code is None:
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _worker(words):
    _plant(Path(words[0]) / "worker.plan")
    _train(*words)


def _train(out, epochs, workers):
    train.main(Path(out), int(epochs), int(workers))


def _supervisor(argv, out):
    subprocess.Popen = ForkedCommand
    _plant(out / "supervisor.plan")
    sys.argv = ["ckptd", *argv]
    command_line.main()


def _plant(plan):
    """Die as the plan says; the plan is gone by then."""
    for (owner, name), real in REAL.items():
        setattr(owner, name, real)  # a worker is no heir to its supervisor's plan
    if not plan.exists():
        return
    chosen = json.loads(plan.read_text())
    left = [chosen["number"]]

    def strike(name):
        with suppress(FileNotFoundError):
            plan.unlink()
            with plan.with_name("struck").open("a") as struck:
                struck.write(f"{name}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name, real):
        def call(*arguments):
            left[0] -= 1
            if left[0] == 0 and chosen["when"] == "before":
                strike(name)
            if left[0] == 0 and chosen["when"] == "within" and name == "write":
                disk, path, content, *mode = arguments
                whole = memoryview(content).cast("B")
                real(disk, path, whole[: len(whole) // 2], *mode)
                strike(name)
            result = real(*arguments)
            if left[0] == 0:
                strike(name)
            return result

        return call

    for (owner, name), real in REAL.items():
        if (owner is RealDisk) == (chosen["what"] == "a write"):
            setattr(owner, name, counted(name, real))


# ------------------------------------------------------------------ one run


class Storm:
    """One run under the storm, from its first launch to its end.

    Args:
        path: the run's own directory.
        rng: draws whom, when and how often.
        kills: how many there may be; after them the run is left in peace.
        plain: the plain run's directory.
        words: how many epochs, and workers of the loader.
        real: new programs instead of forks; then only the clock says when.
    """

    def __init__(self, path, rng, kills, plain, words, *, real) -> None:
        self.path, self.rng, self.most, self.plain, self.real = path, rng, kills, plain, real
        self.words = words
        self.run = Run(path / "runs" / "job")
        self.life_s = REAL_LIFE_S if real else LIFE_S
        self.kills = dict.fromkeys(("supervisor", "both"), 0)
        self.reported = -1
        self.launches = 0
        self.supervisor = self.status = None

    def account(self):
        """How many deaths of which kind there were. A worker's own are the journal's."""
        exits = [e["code"] for e in journal.read(self.run.journal) if e["event"] == "exited"]
        struck = self.path / "struck"
        at = struck.read_text().splitlines() if struck.exists() else []
        return {
            **self.kills,
            "worker": exits.count(-signal.SIGKILL),
            **{f"at {name}": at.count(name) for name in at},
        }

    def total(self):
        counted = self.account()
        return sum(counted[who] for who in ("worker", "supervisor", "both"))

    def to_the_end(self):
        """Kill until there were enough or the run has finished; then let it finish."""
        while not self.life():
            self.check_all()
        self.check_all()
        damaged = [e for e in journal.read(self.run.journal) if e["event"] == "set aside"]
        if damaged:
            raise WrongError(f"set aside as damaged: {damaged}")
        for name in ("metrics.csv", "result.safetensors"):
            if (self.path / name).read_bytes() != (self.plain / name).read_bytes():
                raise WrongError(f"{name} differs from the plain run's")

    def life(self):
        """One `ckptd launch`; whether it finished the run."""
        calm = self.total() >= self.most
        for who, most in (("supervisor", 70), ("worker", 30)):
            self.plan(who, most, chance=0.0 if calm or self.real else 0.5)
        self.launch()
        if calm:
            self.wait(lambda: False, "the run's end")
        else:
            for _ in range(self.rng.choice([0, 1, 3, 6])):
                self.strike_worker()
            self.wait(lambda: False, None, self.rng.uniform(0, self.life_s))
        code = self.ended()
        if code == 0:
            return True
        if code not in (None, -signal.SIGKILL):  # by its plan
            raise WrongError(f"`ckptd launch` ended with {code}")
        self.strike_supervisor()
        return False

    def launch(self):
        self.launches += 1
        argv = ["launch", "--dir", str(self.path / "runs"), "--name", "job", *OPTIONS]
        argv += ["--", sys.executable, train.__file__, str(self.path), *self.words]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CKPTD", "SLURM"))}
        environment["CKPTD_BACKOFF"] = "0"
        with (self.path / "messages").open("ab") as messages:
            output, cwd = messages.fileno(), self.path
            if self.real:
                command = [sys.executable, "-m", "ckptd", *argv]
                self.started = subprocess.Popen(
                    command, cwd=cwd, env=environment, stdout=output, stderr=output
                )
                self.supervisor = self.started.pid
            else:
                self.supervisor = os.fork()
                if self.supervisor == 0:
                    work = partial(_supervisor, argv, self.path)
                    _become(work, environment=environment, cwd=cwd, output=output)
        self.status = None

    def strike_worker(self):
        """Kill the worker alone, after a while."""
        self.wait(lambda: self.worker() is not None, "a worker")
        self.wait(lambda: False, None, self.rng.uniform(0, self.life_s / 2))
        worker, before = self.worker(), self.attempts()
        if self.ended() is not None or worker is None:
            return
        self.ask()
        self.kill(worker)
        self.wait(lambda: self.attempts() > before, "the next attempt")
        self.check_newest()

    def strike_supervisor(self):
        """Kill it, if its plan has not; its worker saves itself, or is killed while it does."""
        worker = self.worker()
        self.ask()
        self.kill(self.supervisor)
        fate = self.rng.choice(["dies too", "dies soon", "left alone", "hurried"])
        if (self.path / "worker.plan").exists():
            fate = "left alone"  # until its plan
        died = False
        if worker is not None and fate.startswith("dies"):
            time.sleep(self.rng.uniform(0, 0.05) if fate == "dies soon" else 0)
            died = self.kill(worker)
        elif worker is not None and fate == "left alone":
            code = self.reap(worker)
            died = code == -signal.SIGKILL
            if code == INTERRUPTED and self.newest() < self.printed(worker):
                raise WrongError(
                    f"a worker that was left alone had printed step {self.printed(worker)} and "
                    f"saved step {self.newest()}"
                )
        self.kills["both" if died else "supervisor"] += 1

    def plan(self, who, most, *, chance):
        """Have a process die at an operation instead of at a time."""
        plan = self.path / f"{who}.plan"
        plan.unlink(missing_ok=True)
        if self.rng.random() < chance:
            what = "a write" if who == "supervisor" else self.rng.choice(["a write", "a tensor"])
            when = self.rng.choice(["before", "within", "after"])
            chosen = {"what": what, "when": when, "number": self.rng.randint(1, most)}
            plan.write_text(json.dumps(chosen))

    # -------------------------------------------------------------- what was promised

    def check_all(self):
        """What was reported durable is there; when nothing runs, all that is there is whole."""
        self.check_newest()
        if self.worker() is None:
            for name in retention.newest_first(RealDisk().names(self.run.checkpoints)):
                self.verify(self.run.checkpoints / name)

    def check_newest(self):
        """What was reported durable is there, or something newer; it verifies."""
        events = journal.read(self.run.journal)
        durable = [event["step"] for event in events if event["event"] == "durable"]
        self.reported = max([self.reported, *durable])
        if self.newest() < self.reported:
            raise WrongError(f"step {self.reported} was reported durable; newest: {self.newest()}")

    def newest(self):
        """The newest checkpoint's step, verified; -1: there is none."""
        while True:
            names = retention.newest_first(RealDisk().names(self.run.checkpoints))
            if not names:
                return -1
            manifest = self.verify(self.run.checkpoints / names[0])
            if manifest is not None:
                return manifest.step

    def verify(self, path):
        """None: it was pruned meanwhile, by whoever is still running."""
        try:
            return store.verify(RealDisk(), path)
        except (DamagedError, OSError) as error:
            if path.exists():
                raise WrongError(str(error)) from error
            return None

    def ask(self):
        """What the supervisor answers when it is asked; it may be too young, or dead."""
        holder = self.run.supervisor()
        if holder is None or holder.pid != self.supervisor or self.ended() is not None:
            return
        with suppress(OSError, CkptdError):
            step = server.ask(holder.socket, "status").facts["durable step"]
            self.reported = max(self.reported, -1 if step is None else int(step))

    def printed(self, worker):
        """The last step that it printed; -1: none."""
        lines = self.run.log.read_text().splitlines() if self.run.log.exists() else []
        own = [line.split() for line in lines if line.endswith(f" of process {worker}")]
        return int(own[-1][1]) if own else -1

    # -------------------------------------------------------------- processes

    def attempts(self):
        return sum(event["event"] == "started" for event in journal.read(self.run.journal))

    def worker(self):
        """The pid of the command, if it runs and is known of."""
        holder = self.run.supervisor()
        if holder is None or holder.child is None:
            return None
        alive = children.started_s(holder.child) == holder.child_started
        return holder.child if alive else None

    def kill(self, pid):
        """Whether that is what it died of."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.reap(pid) == -signal.SIGKILL

    def reap(self, pid):
        """Wait for its end; its exit code, if it is ours to reap."""
        until_s = time.monotonic() + BOUND_S
        while time.monotonic() < until_s:
            try:
                found, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # its supervisor reaps it, or somebody has
                if children.started_s(pid) is None:
                    return None
            else:
                if found:
                    return os.waitstatus_to_exitcode(status)
            time.sleep(POLL_S)
        raise WrongError(f"process {pid} does not end")

    def ended(self):
        """The exit code of `ckptd launch`; None: it runs."""
        if self.status is None:
            found, status = os.waitpid(self.supervisor, os.WNOHANG)
            if found:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, happened, what, at_most_s=BOUND_S):
        """Until it happened, or `ckptd launch` ended, or (without `what`) a time passed."""
        until_s = time.monotonic() + at_most_s
        while self.ended() is None and not happened():
            if time.monotonic() >= until_s:
                if what is None:
                    return
                raise WrongError(f"{what} never came")
            time.sleep(POLL_S)

    def clear_away(self):
        """Leave no process behind, however it ended."""
        for pid in {self.supervisor, self.worker()} - {None}:
            self.kill(pid)


# ------------------------------------------------------------------ many runs


def storm(seed, kills, path, *, epochs, workers, real):
    """An account: how many of which kills, and what was wrong ("": nothing)."""
    rng, words = random.Random(seed), (str(epochs), str(workers))
    plain = path / "plain"
    plain.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        with (plain / "log").open("wb") as log:
            _become(
                partial(_train, plain, *words),
                environment=dict(os.environ),
                cwd=plain,
                output=log.fileno(),
            )
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        return {"wrong": f"the plain run failed: {(plain / 'log').read_text()[-2000:]}"}
    runs, launches, account = 0, 0, Counter()
    while (done := sum(account[who] for who in ("worker", "supervisor", "both"))) < kills:
        own = path / f"run{runs}"
        own.mkdir()
        one = Storm(own, rng, kills - done, plain, words, real=real)
        wrong = ""
        try:
            one.to_the_end()
        except WrongError as error:
            messages = (own / "messages").read_text()[-3000:]
            wrong = f"{own}: {error}\n{messages}"
        finally:
            one.clear_away()
        runs, launches = runs + 1, launches + one.launches
        account.update(one.account())
        if wrong:
            break
    return {"runs": runs, "launches": launches, **account, "wrong": wrong}


def main():
    warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)  # orphans are ours to reap
    with tempfile.TemporaryDirectory() as path, redirect_stdout(None):
        _train(path, 1, 1)  # what torch imports late is imported here, once
    for line in sys.stdin:
        asked = json.loads(line)
        account = storm(asked.pop("seed"), asked.pop("kills"), Path(asked.pop("path")), **asked)
        print(json.dumps(account), flush=True)


if __name__ == "__main__":
    main()
