"""`ckptd launch` around commands that know nothing of ckptd: real processes, no torch."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import BOUND_S, Workshop

READY = "print('ready', flush=True);"
FOREVER = f"import time; {READY} time.sleep({BOUND_S})"


class Launched:
    """A running `ckptd launch` whose command printed `ready`."""

    def __init__(self, workshop: Workshop, argv: list[str], *options: str, **more: str) -> None:
        self.process = subprocess.Popen(
            [*workshop.command(*options), *argv],
            cwd=workshop.path,
            env=workshop.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", line + (self.process.stderr.read() if not line else "")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, out, err


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def started(workshop: Workshop) -> int:
    return sum(event["event"] == "started" for event in workshop.journal())


def test_a_finished_command_is_finished(workshop: Workshop) -> None:
    """Exit status 0 ends the run with 0; the same line again says so, runs nothing and exits 0."""
    first = workshop.launch(*python("print('hello')"))
    again = workshop.launch(*python("print('hello')"))
    assert (first.returncode, first.stdout) == (0, "hello\n")
    assert (again.returncode, again.stdout) == (0, "")
    assert "has finished" in again.stderr
    assert started(workshop) == 1


def test_a_failing_command_is_given_up_on_with_a_report(workshop: Workshop) -> None:
    """Failures without progress: so many restarts, then 70 and all that a person needs."""
    code = "import sys; print('the last words'); sys.exit(3)"
    done = workshop.launch(*python(code), options=("--max-restarts", "2"))
    assert done.returncode == 70
    assert started(workshop) == 3
    for expected in ("exit status 3", "step 0", "  the last words", "log", "ckptd status job"):
        assert expected in done.stderr
    assert (workshop.path / "runs/job/log").read_text() == "the last words\n" * 3


def test_a_signal_is_named(workshop: Workshop) -> None:
    """A command that dies of a signal is reported by the signal's name."""
    code = "import os; os.kill(os.getpid(), 11)"
    done = workshop.launch(*python(code), options=("--max-restarts", "0"))
    assert done.returncode == 70
    assert "signal 11 (SIGSEGV)" in done.stderr


@pytest.mark.parametrize("argv", [["no-such-command"], ["./nothing.py"]])
def test_a_missing_command_is_bad_usage(workshop: Workshop, argv: list[str]) -> None:
    """It is said before anything is written, and not retried."""
    done = workshop.launch(*argv)
    assert done.returncode == 64
    assert repr(argv[0]) in done.stderr
    assert not (workshop.path / "runs/job").exists()


@pytest.mark.parametrize(
    "options",
    [("--every", "0"), ("--keep", "0"), ("--max-restarts", "-1"), ("--flush-signal", "X")],
)
def test_bad_options_are_bad_usage(workshop: Workshop, options: tuple[str, ...]) -> None:
    """An impossible setting exits with 64 and starts nothing."""
    assert workshop.launch("true", options=options).returncode == 64
    assert not (workshop.path / "runs/job").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_stop_is_passed_on(workshop: Workshop, number: signal.Signals) -> None:
    """The command gets the signal itself; dying of it gives 128+n."""
    code = f"import signal; signal.signal(2, signal.SIG_DFL); {FOREVER}"
    launched = Launched(workshop, python(code))
    launched.send(number)
    code_, _, err = launched.end()
    assert code_ == 128 + number, err
    assert number.name in err
    assert started(workshop) == 1


def test_a_commands_own_handling_is_its_own(workshop: Workshop) -> None:
    """A command that handles SIGTERM and exits with a code of its own is not started again."""
    code = f"import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); {FOREVER}"
    launched = Launched(workshop, python(code))
    launched.send(signal.SIGTERM)
    assert launched.end()[0] == 7
    assert started(workshop) == 1


def test_flush_signal(workshop: Workshop) -> None:
    """With --flush-signal, a program's own signal is sent, and 75 says that it goes on later."""
    code = f"import signal, sys; signal.signal(10, lambda *_: sys.exit(9)); {FOREVER}"
    launched = Launched(workshop, python(code), "--flush-signal", "USR1")
    launched.send(signal.SIGTERM)
    assert launched.end()[0] == 75


def test_one_that_ignores_everything_is_killed(workshop: Workshop) -> None:
    """At the end of the grace it is killed, with everything that it started."""
    code = f"import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 10, 15)]; {FOREVER}"
    launched = Launched(workshop, python(code), "--grace", "0.2")
    launched.send(signal.SIGTERM)
    assert launched.end()[0] == 128 + signal.SIGKILL


def test_nothing_outlives_the_job(workshop: Workshop) -> None:
    """Daemons that left the session and were orphaned twice are dead when launch returns."""
    code = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("daemon", "w").write(str(os.getpid()))
        time.sleep({BOUND_S})
    os._exit(0)
os.wait()
while not os.path.exists("daemon") or not open("daemon").read():
    time.sleep(0.01)
"""
    assert workshop.launch(*python(code)).returncode == 0
    assert not psutil.pid_exists(int((workshop.path / "daemon").read_text()))


def test_a_second_supervisor_is_refused(workshop: Workshop) -> None:
    """One supervisor per run: the second exits with 69 and names the first."""
    launched = Launched(workshop, python(FOREVER))
    second = workshop.launch(*python(FOREVER))
    assert second.returncode == 69
    assert f"process {launched.process.pid}" in second.stderr
    launched.send(signal.SIGTERM)
    launched.end()


def test_another_command_is_refused_with_the_difference(workshop: Workshop) -> None:
    """Changed argv or directory: 64 with both shown; --accept-changes goes on."""
    assert workshop.launch(*python("raise SystemExit(1)"), options=("--max-restarts", "0"))
    changed = workshop.launch(*python("print('new')"))
    assert changed.returncode == 64
    assert "raise SystemExit(1)" in changed.stderr
    assert "print(" in changed.stderr
    (workshop.path / "elsewhere").mkdir()
    accepted = workshop.launch(*python("print('new')"), options=("--accept-changes",))
    assert (accepted.returncode, accepted.stdout) == (0, "new\n")


def test_fresh_keeps_the_old_run(workshop: Workshop) -> None:
    """--fresh starts over; the old directory is renamed, and said."""
    workshop.launch(*python("print('one')"))
    fresh = workshop.launch(*python("print('two')"), options=("--fresh",))
    assert (fresh.returncode, fresh.stdout) == (0, "two\n")
    assert (workshop.path / "runs/job.old-1/log").read_text() == "one\n"
    assert "job.old-1" in fresh.stderr


def test_an_orphan_that_does_not_end_is_killed(workshop: Workshop) -> None:
    """A killed supervisor's command lives on: the next launch waits, kills it, takes over."""
    code = "import os; open('pid', 'w').write(str(os.getpid()));" + FOREVER
    launched = Launched(workshop, python(code))
    launched.send(signal.SIGKILL)
    launched.process.wait(BOUND_S)
    orphan = psutil.Process(int((workshop.path / "pid").read_text()))
    second = Launched(workshop, python(code), "--grace", "0.3")
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    second.send(signal.SIGTERM)
    assert "was killed" in second.end()[2]


def test_what_decides_about_bits_is_kept(workshop: Workshop) -> None:
    """PYTHONHASHSEED and thread counts are those of the first launch in every later one."""
    code = (
        "import os; print([os.environ.get(k) for k in "
        "('PYTHONHASHSEED', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS')]); raise SystemExit(1)"
    )
    once = ("--max-restarts", "0")
    first = workshop.launch(*python(code), options=once, OMP_NUM_THREADS="1")
    again = workshop.launch(*python(code), options=once, OMP_NUM_THREADS="2", MKL_NUM_THREADS="5")
    assert first.stdout == again.stdout == "['0', '1', None]\n"


def test_output_comes_as_it_is_written(workshop: Workshop) -> None:
    """A line is passed on while the command still runs, standard error with it."""
    code = f"import sys; {READY} print('err', file=sys.stderr); input_ = sys.stdin.read()"
    launched = Launched(workshop, python(code))
    code_, out, _ = launched.end()
    assert (code_, out) == (0, "err\n")


def test_a_torn_journal_is_read(workshop: Workshop) -> None:
    """A line that a crash tore is passed over, and the next event starts a line of its own."""
    workshop.launch(*python("raise SystemExit(1)"), options=("--max-restarts", "0"))
    journal = workshop.path / "runs/job/journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"t": 17, "ev')
    workshop.launch(*python("raise SystemExit(1)"), options=("--max-restarts", "0"))
    assert started(workshop) == 2


def test_ckptd_help_is_light() -> None:
    """`ckptd launch --help` imports neither torch nor numpy nor rich."""
    argv = [sys.executable, "-X", "importtime", "-m", "ckptd", "launch", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=BOUND_S)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {"torch", "numpy", "rich"}
    assert "--grace" in done.stdout


def test_the_log_directory_may_be_anywhere(workshop: Workshop, tmp_path: Path) -> None:
    """CKPTD_DIR names the directory of runs; a deep path is no problem for the socket."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    argv = [sys.executable, "-m", "ckptd", "launch", "--", *python("print('x')")]
    done = subprocess.run(
        argv,
        env=workshop.environment(CKPTD_DIR=str(deep)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(deep.iterdir())) == 1
