"""`ckptd launch` with commands that never attach: exit codes, restarts, signals, survivors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOUND_S, Workshop
from launched import (
    Launched,
    is_alive,
    no_leftovers,  # noqa: F401  # a fixture for every test here
    python,
)

WAITS = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(60)"


def test_finished(workshop: Workshop) -> None:
    """A command that ends with 0 has finished; the same line again says so and does not run it."""
    argv = "sh", "-c", "echo ran"
    done = workshop.launch(*argv)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    again = workshop.launch(*argv)
    assert (again.returncode, again.stdout) == (0, "")
    assert "has finished" in again.stderr


def test_gives_up(workshop: Workshop) -> None:
    """A command that keeps failing is started 1 + --max-restarts times, then reported: status, last
    lines of output, where to look; exit code 70."""
    done = workshop.launch("sh", "-c", "echo why >&2; exit 3", options=("--max-restarts", "2"))
    assert done.returncode == 70
    assert done.stdout == "why\n" * 3
    for text in ("gave up", "exit status 3", "  why", str(workshop.path / "runs/job/log")):
        assert text in done.stderr


def test_names_the_signal(workshop: Workshop) -> None:
    """The report of a command that was killed names the signal."""
    done = workshop.launch("sh", "-c", "kill -SEGV $$", options=("--max-restarts", "0"))
    assert done.returncode == 70
    assert "signal 11 (SIGSEGV)" in done.stderr


@pytest.mark.parametrize("word", ["no-such-command", "./not-executable", "./directory"])
def test_no_such_command(workshop: Workshop, word: str) -> None:
    """A command that can't be started is refused with 64 before anything is created."""
    (workshop.path / "not-executable").touch()
    (workshop.path / "directory").mkdir()
    done = workshop.launch(word)
    assert done.returncode == 64
    assert word in done.stderr
    assert not (workshop.path / "runs").exists()


@pytest.mark.parametrize(
    "options", [("--no-such-option",), ("--every", "0"), ("--keep", "0"), ("--flush-signal", "X")]
)
def test_bad_options(workshop: Workshop, options: tuple[str, ...]) -> None:
    """A wrong option is refused with 64."""
    assert workshop.launch("true", options=options).returncode == 64


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "-x", "x" * 101])
def test_bad_name(workshop: Workshop, name: str) -> None:
    """A name that is no file name is refused with 64."""
    command = [*workshop.command()[:-1], f"--name={name}", "--", "true"]
    done = subprocess.run(command, cwd=workshop.path, capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert list(workshop.path.iterdir()) == []


def test_help_is_light() -> None:
    """`ckptd launch --help` imports neither torch nor numpy nor rich."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ckptd", "launch", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "msgspec" in imported
    assert imported & {"torch", "numpy", "rich", "safetensors"} == set()
    assert "--max-restarts" in done.stdout


def test_output_passes_through(workshop: Workshop) -> None:
    """Output and errors come out as the command wrote them, byte for byte, and are in the log."""
    source = "import os\nos.write(1, bytes(range(256)))\nos.write(2, b'no newline')"
    done = subprocess.run(
        [*workshop.command(), *python(source)],
        cwd=workshop.path,
        env=workshop.environment(),
        capture_output=True,
        check=True,
    )
    assert done.stdout == bytes(range(256)) + b"no newline"
    assert (workshop.path / "runs/job/log").read_bytes() == done.stdout


def test_standard_output_gone(workshop: Workshop) -> None:
    """When nobody reads our output any more, the job goes on, and ends with its own exit code."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [*workshop.command(), *python("print('x' * 99)\nprint('y' * 10**6)")],
        cwd=workshop.path,
        env=workshop.environment(),
        stdout=writer,
    )
    os.close(writer)
    assert process.wait(BOUND_S) == 0
    assert (workshop.path / "runs/job/log").stat().st_size == 100 + 10**6 + 1


def test_fixed_environment(workshop: Workshop) -> None:
    """Hash seed and thread counts of the first launch are those of every attempt."""
    names = "PYTHONHASHSEED", "OMP_NUM_THREADS", "MKL_NUM_THREADS"
    source = f"import os\nprint([os.environ.get(n) for n in {names}])\nraise SystemExit(1)"
    options = "--max-restarts", "0"
    first = workshop.launch(*python(source), options=options)
    assert first.stdout == "['0', '1', None]\n"
    again = workshop.launch(
        *python(source),
        options=options,
        PYTHONHASHSEED="7",
        OMP_NUM_THREADS="9",
        MKL_NUM_THREADS="9",
    )
    assert again.stdout == first.stdout


def test_changed_command(workshop: Workshop) -> None:
    """The same name with another command is refused with 64 and the difference; --accept-changes
    goes on with it; --fresh keeps the old run beside the new one."""
    workshop.launch("sh", "-c", "exit 1", options=("--max-restarts", "0"))
    refused = workshop.launch("sh", "-c", "echo new")
    assert (refused.returncode, refused.stdout) == (64, "")
    assert "exit 1" in refused.stderr
    assert "echo new" in refused.stderr
    accepted = workshop.launch("sh", "-c", "echo new", options=("--accept-changes",))
    assert (accepted.returncode, accepted.stdout) == (0, "new\n")
    fresh = workshop.launch("sh", "-c", "echo fresh", options=("--fresh",))
    assert (fresh.returncode, fresh.stdout) == (0, "fresh\n")
    assert (workshop.path / "runs/job.old-1/log").read_text() == "new\n"
    assert (workshop.path / "runs/job/log").read_text() == "fresh\n"


def test_changed_directory(workshop: Workshop) -> None:
    """The same name from another working directory is refused with 64 and both directories."""
    workshop.launch("sh", "-c", "exit 1", options=("--max-restarts", "0"))
    elsewhere = workshop.path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [*workshop.command(), "sh", "-c", "exit 1"],
        cwd=elsewhere,
        env=workshop.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert str(elsewhere) in done.stderr


def test_second_supervisor(workshop: Workshop) -> None:
    """A job that is running can't be launched a second time: 69, naming the process; the first one
    is not disturbed."""
    first = Launched(workshop, *python(WAITS))
    first.wait_for("ready")
    second = workshop.launch(*python(WAITS))
    assert second.returncode == 69
    assert str(first.process.pid) in second.stderr
    fresh = workshop.launch(*python(WAITS), options=("--fresh",))
    assert fresh.returncode == 69
    assert first.process.poll() is None
    first.signal(signal.SIGTERM).ends()


def test_killed_supervisor(workshop: Workshop) -> None:
    """After SIGKILL to the supervisor its command still holds the job; the next launch gives it
    the grace, ends it, and starts it again. There are never two."""
    launched = Launched(workshop, *python(WAITS))
    launched.wait_for("ready")
    (orphan,) = launched.descendants()
    launched.kill()
    again = Launched(workshop, *python(WAITS), options=("--grace", "0.2"))
    again.wait_for("was killed")
    again.wait_for("ready")
    assert not is_alive(orphan.pid)
    assert again.signal(signal.SIGTERM).ends() == 128 + signal.SIGTERM


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_passes_signals_on(workshop: Workshop, number: int) -> None:
    """A stop signal is passed on to the command, whose own exit status then is ours."""
    source = (
        "import signal, sys\n"
        f"signal.signal({int(number)}, lambda n, f: sys.exit(40 + n))\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()"
    )
    launched = Launched(workshop, *python(source))
    launched.wait_for("ready")
    assert launched.signal(number).ends() == 40 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_dies_of_the_signal(workshop: Workshop, number: int) -> None:
    """A command that is no worker and dies of the signal: exit code 128 + n, and no restart."""
    launched = Launched(workshop, *python(WAITS))
    launched.wait_for("ready")
    assert launched.signal(number).ends() == 128 + number
    assert launched.output == ["ready"]


def test_stopped_with_0(workshop: Workshop) -> None:
    """A command that, asked to stop, ends with 0 passes that on, but has not finished."""
    argv = "sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done"
    launched = Launched(workshop, *argv)
    launched.wait_for("ready")
    assert launched.signal(signal.SIGTERM).ends() == 0
    again = Launched(workshop, *argv)
    again.wait_for("ready")
    again.signal(signal.SIGTERM).ends()


def test_flush_signal(workshop: Workshop) -> None:
    """With --flush-signal USR1 a stop sends that signal instead, and the job may be started again:
    exit code 75, however it ended."""
    argv = "sh", "-c", "trap 'echo saved; exit 9' USR1; echo ready; while :; do sleep 0.01; done"
    launched = Launched(workshop, *argv, options=("--flush-signal", "USR1"))
    launched.wait_for("ready")
    assert launched.signal(signal.SIGTERM).ends() == 75
    assert launched.output == ["ready", "saved"]


def test_grace(workshop: Workshop) -> None:
    """A command that ignores the signal is killed at the end of the grace."""
    argv = "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    launched = Launched(workshop, *argv, options=("--grace", "0.2"))
    launched.wait_for("ready")
    processes = launched.descendants()
    assert launched.signal(signal.SIGTERM).ends() == 128 + signal.SIGKILL
    assert processes
    assert not any(is_alive(p.pid) for p in processes)


def test_ignores(workshop: Workshop) -> None:
    """SIGCONT, and SIGUSR2 for a command without a worker, do not stop the job."""
    launched = Launched(workshop, *python(WAITS))
    launched.wait_for("ready")
    launched.signal(signal.SIGCONT).signal(signal.SIGUSR2)
    launched.wait_for("SIGUSR2")
    assert launched.process.poll() is None
    assert launched.signal(signal.SIGTERM).ends() == 128 + signal.SIGTERM


def test_stop_while_pausing(workshop: Workshop) -> None:
    """A stop between two attempts is obeyed at once: 75."""
    environment = {**workshop.environment(), "CKPTD_BACKOFF": "50"}
    workshop.environment = lambda **_: environment  # type: ignore[method-assign]
    launched = Launched(workshop, "sh", "-c", "exit 1")
    launched.wait_for("starting it again")
    assert launched.signal(signal.SIGTERM).ends() == 75


# ------------------------------------------------------------------ survivors


def daemon(path: Path, code: int, *, stay: bool) -> tuple[str, ...]:
    """A command that leaves a daemon behind: forked twice, in a session of its own."""
    script = path / "daemon.py"
    script.write_text(
        "import os, sys, time\n"
        "reader, writer = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        print('daemon', os.getpid(), flush=True)\n"
        "        os.write(writer, b'.')\n"
        "        while True: time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.read(reader, 1)\n" + ("time.sleep(10**6)\n" if stay else "") + f"sys.exit({code})\n"
    )
    return sys.executable, str(script)


@pytest.mark.parametrize("code", [0, 1])
def test_no_survivors(workshop: Workshop, code: int) -> None:
    """When the command has ended, well or badly, its daemons are killed before we end."""
    done = workshop.launch(
        *daemon(workshop.path, code, stay=False), options=("--max-restarts", "0")
    )
    assert done.returncode == (70 if code else 0)
    pid = int(done.stdout.split()[1])
    assert not is_alive(pid)


def test_no_survivors_of_a_stop(workshop: Workshop) -> None:
    """After a stop no process of the job is left, daemons included."""
    launched = Launched(workshop, *daemon(workshop.path, 0, stay=True))
    pid = int(launched.wait_for("daemon").split()[1])
    launched.signal(signal.SIGTERM).ends()
    assert not is_alive(pid)


def test_srun_is_told_to_end(workshop: Workshop) -> None:
    """Killed, it would leave behind what it started on other nodes; it gets time to end that."""
    srun = workshop.path / "srun"
    srun.write_text(
        "#!/bin/bash\ntrap 'echo told; test -e once && exit; touch once' TERM\n"
        "echo ready\nwhile true; do sleep 0.05; done\n"
    )
    srun.chmod(0o755)
    job = Launched(workshop, str(srun), options=("--grace", "1"))
    job.wait_for("ready")
    job.signal(signal.SIGTERM)  # passed on to the command, as it has no worker
    job.ends()
    assert job.output.count("told") == 2, "once more at the end of the grace, and not killed"
