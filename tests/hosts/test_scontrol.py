"""What Slurm is asked, when, and what happens when it answers late, wrongly or never.

`scontrol` is a script of the test's own here, which can be all that; the real one is in `slurm`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Workshop, wait_until
from launched import Launched, checkpoints, fake, no_leftovers, python  # noqa: F401  # for every test here

from ckptd.cli.status import look
from ckptd.host import slurm
from ckptd.host.host import Notice
from ckptd.supervisor.run import Run

SCRIPT = """#!/bin/sh
cd "$(dirname "$0")" || exit 1
echo "$*" >> calls
[ -e hangs ] && exec sleep 600
case "$1" in requeue) [ -e refuses-once ] && rm refuses-once && exit 1 ;; esac
if [ -e fails ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller" >&2
    exit 1
fi
[ -e hangs-once ] && rm hangs-once && exec sleep 600
case "$*" in
    *"show job"*) cat job ;;
    "show config") echo "KillWait                = 30 sec" ;;
    hold*|requeuehold*) if [ -e refuses-to-hold ]; then echo "Access denied" >&2; exit 1; fi ;;
    requeue*) cp --no-clobber ../runs/job/journal.jsonl journal-then ;;
esac
"""
LEFT_S = 1000
STARTED_AT = 1_000_000


class Scontrol:
    """The script, and what it is told to answer.

    Attributes:
        path: its directory; a file "hangs", "hangs-once", "fails", "refuses-once" or
            "refuses-to-hold" in it changes it.
    """

    def __init__(self, workshop: Workshop) -> None:
        self.path = workshop.path / "bin"
        self.path.mkdir()
        script = self.path / "scontrol"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        self.says("RUNNING")

    def says(self, state: str, **more: str) -> None:
        """What it says of the job from now on."""
        end = int(time.time()) + LEFT_S
        fields = {"JobId": "7", "JobState": state, "Reason": "None", "Requeue": "1"}
        fields |= {"Restarts": "0", "BatchFlag": "1", "EndTime": str(end), "PreemptTime": "None"}
        fields |= {"StartTime": str(STARTED_AT)}
        words = " ".join(f"{key}={value}" for key, value in (fields | more).items())
        (self.path / "new").write_text(words + "\n")
        (self.path / "new").rename(self.path / "job")

    def set(self, what: str) -> None:
        (self.path / what).touch()

    def calls(self) -> list[str]:
        """All that it was asked."""
        return (self.path / "calls").read_text().splitlines()

    def requeues(self) -> int:
        return self.calls().count("requeue 7")

    def launched(self, workshop: Workshop, *options: str) -> Launched:
        """A job that believes to be job 7 of this Slurm, and runs."""
        one = self.started(workshop, *fake(*options))
        one.wait_for("step 3")
        return one

    def started(self, workshop: Workshop, *argv: str, options: tuple[str, ...] = ()) -> Launched:
        """The same, from the first instant on."""
        path = f"{self.path}:{os.environ['PATH']}"
        return Launched(workshop, *argv, options=options, PATH=path, SLURM_JOB_ID="7")


@pytest.fixture
def scontrol(workshop: Workshop) -> Scontrol:
    return Scontrol(workshop)


def test_it_is_asked_last(workshop: Workshop, scontrol: Scontrol) -> None:
    """For a requeue, which kills whoever asks: all is durable then, and written down."""
    launched = scontrol.launched(workshop)
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert scontrol.calls()[-1] == "requeue 7"
    assert scontrol.requeues() == 1
    then = (scontrol.path / "journal-then").read_text()
    assert '"durable"' in then
    assert '"stopped"' in then
    assert "asked Slurm to put job 7 back" in launched.told()


def test_the_deadline_is_the_end_that_it_names(workshop: Workshop, scontrol: Scontrol) -> None:
    """And KillWait; neither the variable of the environment nor the time of the preemption."""
    launched = scontrol.launched(workshop)
    assert launched.signal(signal.SIGUSR1).ends() == 75, launched.told()
    left = int(launched.told().partition("the host leaves ")[2].partition(" s")[0])
    assert LEFT_S / 2 < left <= LEFT_S + 30


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "FAILED"])
def test_what_was_cancelled_stays_so(workshop: Workshop, scontrol: Scontrol, state: str) -> None:
    launched = scontrol.launched(workshop)
    scontrol.says(state)
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert scontrol.requeues() == 0
    assert f"job 7 was cancelled ({state})" in launched.told()
    assert checkpoints(workshop)


def test_preempted_for_good(workshop: Workshop, scontrol: Scontrol) -> None:
    """A preemption that cancels (PreemptMode=CANCEL) looks like a user's cancel, but for its time;
    a time from before this start is an earlier preemption's."""
    launched = scontrol.launched(workshop)
    scontrol.says("COMPLETING", PreemptTime=str(STARTED_AT - 1))
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert scontrol.requeues() == 0
    launched = scontrol.launched(workshop)
    scontrol.says("COMPLETING", PreemptTime=str(STARTED_AT + 1))
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert scontrol.requeues() == 1


def test_a_signal_before_the_job_runs(workshop: Workshop, scontrol: Scontrol) -> None:
    """While scontrol does not answer: heard all the same, and the job is put back."""
    scontrol.set("hangs")
    launched = scontrol.started(workshop, *fake())
    wait_until((scontrol.path / "calls").exists)
    launched.signal(signal.SIGUSR1)
    (scontrol.path / "hangs").unlink()
    assert launched.ends() == 75, launched.told()
    assert "stopped (SIGUSR1)" in launched.told()
    assert scontrol.requeues() == 1
    assert launched.steps() == []


def given_up(workshop: Workshop, scontrol: Scontrol, state: str, **more: str) -> Launched:
    """A job that is interrupted before it got anywhere, and may not be so even once."""
    argv = python(
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('step 1', flush=True)\nsignal.pause()"
    )
    launched = scontrol.started(workshop, *argv, options=("--max-requeues", "0"))
    launched.wait_for("step 1")
    scontrol.says(state, **more)
    assert launched.signal(signal.SIGTERM).ends() == 70, launched.told()
    assert "gave up: interrupted once before" in launched.told()
    assert scontrol.requeues() == 0
    return launched


def test_given_up_on(workshop: Workshop, scontrol: Scontrol) -> None:
    """Slurm does nothing by itself: neither is it asked for anything."""
    launched = given_up(workshop, scontrol, "RUNNING")
    assert "the job is not put back into the queue" in launched.told()
    assert not any("hold" in call for call in scontrol.calls())


def test_given_up_on_but_slurm_did_not(workshop: Workshop, scontrol: Scontrol) -> None:
    """What Slurm has put back by itself, or is about to, is held there, and it is said."""
    launched = given_up(workshop, scontrol, "COMPLETING", Restarts="1")
    assert scontrol.calls()[-1] == "hold 7"
    assert "`scontrol release 7`" in launched.told()
    assert "not put back" not in launched.told()
    launched = given_up(workshop, scontrol, "RUNNING", PreemptTime=str(STARTED_AT + 1))
    assert scontrol.calls()[-1] == "requeuehold 7"
    assert "`scontrol release 7`" in launched.told()


def test_given_up_on_and_not_held(workshop: Workshop, scontrol: Scontrol) -> None:
    """Then the truth is that Slurm starts it again."""
    scontrol.set("refuses-to-hold")
    launched = given_up(workshop, scontrol, "COMPLETING", Restarts="1")
    assert "Access denied" in launched.told()
    assert "end it with `scancel 7`" in launched.told()


@pytest.mark.parametrize("what", ["damaged", "unwritable"])
def test_a_count_that_is_lost(workshop: Workshop, scontrol: Scontrol, what: str) -> None:
    """The cap on requeues is no reason to lose a job that was saved."""
    launched = scontrol.launched(workshop)
    count = workshop.path / "runs/job/requeues.json"
    if what == "damaged":
        count.write_text('{"without')
    else:
        count.mkdir()  # not to be replaced by a file
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert f"{count}" in launched.told()
    assert scontrol.requeues() == 1


def test_a_second_sigterm_is_no_force(workshop: Workshop, scontrol: Scontrol) -> None:
    """Slurm sends two. The worker is in the middle of a step, and gets the time to end it."""
    gate = workshop.path / "gate"
    launched = scontrol.launched(workshop, "--gate", str(gate))
    run = Run(workshop.path / "runs" / "job")
    for _ in range(3):
        launched.signal(signal.SIGTERM)
        launched.signal(signal.SIGCONT)
        for _ in range(2):  # the signals were seen when the second question is answered
            look(run)
    gate.touch()
    assert launched.ends() == 75, launched.told()
    assert checkpoints(workshop)
    assert scontrol.requeues() == 1


def test_no_answer_while_it_is_saved(workshop: Workshop, scontrol: Scontrol) -> None:
    """How long is left is asked at a stop; nobody waits for the answer before saving."""
    launched = scontrol.launched(workshop)
    scontrol.set("hangs-once")
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert not (scontrol.path / "hangs-once").exists()
    at_s = {event["event"]: float(str(event["t"])) for event in workshop.journal()}
    assert at_s["durable"] - at_s["asked to stop"] < slurm._LOOK_BOUND_S
    assert scontrol.requeues() == 1


def test_it_fails(workshop: Workshop, scontrol: Scontrol) -> None:
    """The job runs and is saved without it; at the end it is said what is left to do by hand."""
    scontrol.set("fails")
    launched = scontrol.launched(workshop)
    launched.wait_for("until nobody knows when")
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert checkpoints(workshop)
    assert "Unable to contact slurm controller" in launched.told()
    assert "put it back by hand with `scontrol requeue 7`" in launched.told()


def test_it_fails_once(workshop: Workshop, scontrol: Scontrol) -> None:
    """Controllers are restarted: it is asked again."""
    scontrol.set("refuses-once")
    launched = scontrol.launched(workshop)
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert scontrol.requeues() == 2
    assert "asked Slurm to put job 7 back" in launched.told()


def test_it_hangs(workshop: Workshop, scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question has its bound, and what is said names it."""
    monkeypatch.setattr(slurm, "_LOOK_BOUND_S", 0.1)
    monkeypatch.setattr(slurm, "_ASK_BOUND_S", 0.1)
    monkeypatch.setattr(slurm, "_PAUSE_S", 0.0)
    scontrol.set("hangs")
    path = f"{scontrol.path}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    job = slurm.Slurm({"SLURM_JOB_ID": "7", "PATH": path})
    assert "until nobody knows when: scontrol did not answer within 0.1 s" in job.described()
    assert job.notice() == Notice()
    said = job.again()
    assert said is not None
    assert "put it back by hand with `scontrol requeue 7`" in said
    assert job.doubts(None)[0][0].startswith("scontrol: scontrol did not answer")


def printed(
    *argv: str, options: tuple[str, ...] = ("--array", "0-9")
) -> subprocess.CompletedProcess[str]:
    """What `ckptd slurm-script` prints for a command."""
    return subprocess.run(
        [sys.executable, "-m", "ckptd", "slurm-script", *options, "--", *argv],
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_printed_scripts_words(tmp_path: Path) -> None:
    """As they were given, but Slurm's variables are filled in, wherever in a word they stand."""
    program = tmp_path / "ckptd"
    program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    hard = 'a\'b "c" \\d `e` $HOME ${HOME} $'
    words = ("python", "--out=out/$SLURM_ARRAY_TASK_ID", "${SLURM_JOB_ID}x" + hard, hard)
    done = subprocess.run(
        ["bash", "-c", printed(*words).stdout],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "7", "SLURM_JOB_ID": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    given = done.stdout.partition("\0--\0")[2].split("\0")[:-1]
    assert given == ["python", "--out=out/7", "3x" + hard, hard]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("python train.py", ""),
        ("torchrun --nproc-per-node 4 train.py --max-restarts 3", ""),
        ("torchrun --max-restarts=0 train.py", ""),
        ("torchrun --max-restarts 3 train.py", "leave it at 0"),
        ("python -m torch.distributed.run --max_restarts=2 train.py", "leave it at 0"),
        ("--nodes 2 -- srun torchrun --nnodes=2 train.py", ""),
        ("--nodes 2 -- torchrun --nproc-per-node=8 train.py", ""),
        ("--nodes 2 -- torchrun --standalone train.py", "--standalone is for one node"),
        ("--nodes 2 -- python train.py", "put `srun` in front"),
    ],
)
def test_a_printed_script_of_several_ranks(line: str, said: str) -> None:
    """What would go wrong is said before it waits in the queue, and nothing else."""
    options, _, words = line.rpartition("-- ")
    done = printed(*words.split(), options=tuple(options.split()))
    assert (said in done.stderr) if said else (done.stderr == "")
    assert ("#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in done.stdout) == bool(options)


def test_a_printed_script_of_several_nodes(tmp_path: Path) -> None:
    """A torchrun is started on each, and knows where the others are; what was given, stays."""
    program = tmp_path / "srun"
    program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    ckptd = tmp_path / "ckptd"
    ckptd.write_text('#!/bin/bash\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n')
    ckptd.chmod(0o755)
    words = ("torchrun", "--rdzv_id=mine", "--nproc-per-node=8", "train.py", "a 'b'", "$HOME")
    done = subprocess.run(
        ["bash", "-c", printed(*words, options=("--nodes", "2")).stdout],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURMD_NODENAME": "n1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\0")[:-1] == [
        *("--kill-on-bad-exit=1", "torchrun", "--nnodes=2", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=n1:22345", *words[1:]),
    ]


def test_what_the_doctor_finds(
    workshop: Workshop, scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KillWait against a flush's time, and whether Slurm would start the job again."""
    monkeypatch.setenv("PATH", path := f"{scontrol.path}:{os.environ['PATH']}")
    job = slurm.Slurm({"SLURM_JOB_ID": "7", "PATH": path})
    assert job.doubts(None) == []
    assert job.doubts(5.0) == [], "well within KillWait, 30 s"
    ((what, mend),) = job.doubts(100.0)
    assert "30 s from SIGTERM to SIGKILL" in what
    assert mend == "#SBATCH --signal=B:USR1@200"
    scontrol.says("RUNNING", Requeue="0", BatchFlag="0")
    assert [mend.split()[0] for _, mend in job.doubts(None)] == ["#SBATCH", "submit"]


@pytest.mark.parametrize(
    ("state", "more", "why"),
    [
        ("RUNNING", {}, None),
        ("RUNNING", {"EndTime": "soon"}, "its time limit comes"),
        ("RUNNING", {"PreemptTime": "9", "StartTime": "8"}, "it is preempted"),
        ("COMPLETING", {"Reason": "TimeLimit"}, "its time limit is over"),
        ("COMPLETING", {"PreemptTime": "9", "StartTime": "8"}, "it was preempted"),
        ("COMPLETING", {"Restarts": "1"}, "it was requeued"),
        ("COMPLETING", {}, "it was cancelled"),
    ],
)
def test_why_it_was_signalled(
    scontrol: Scontrol,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    more: dict[str, str],
    why: str | None,
) -> None:
    """Slurm knows what a signal is for, which alone says nothing."""
    monkeypatch.setenv("PATH", f"{scontrol.path}:{os.environ['PATH']}")
    if more.get("EndTime") == "soon":
        more = {"EndTime": str(int(time.time()) + 100)}
    scontrol.says(state, **more)
    assert slurm.Slurm({**os.environ, "SLURM_JOB_ID": "7"}).notice().why == why
