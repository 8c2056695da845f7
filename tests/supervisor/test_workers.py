"""`ckptd launch` with a worker: stops, kills, relaunches, receipts. The worker is a fake one that
counts steps (fake_worker.py); everything else is real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from conftest import Workshop
from launched import (
    FAKE,
    Launched,
    checkpoints,
    fake,
    is_alive,
    logged,
    no_leftovers,  # noqa: F401  # a fixture for every test here
    wait_gone,
)

from ckptd import wire
from ckptd.store import manifest as manifests
from ckptd.supervisor import server

TOTAL = 60
TO_THE_END = list(range(1, TOTAL + 1))


def through_shell(*options: str) -> tuple[str, ...]:
    """The fake worker as a grandchild, behind a shell that hides how it ended."""
    return "sh", "-c", f"{sys.executable} {FAKE} {' '.join(options)}; true"


def finish(workshop: Workshop, *argv: str) -> None:
    """Launch the same job again, to its end."""
    done = workshop.launch(*argv)
    assert done.returncode == 0, done.stderr


def address(workshop: Workshop) -> str:
    """The running supervisor's socket."""
    return json.loads((workshop.path / "runs/job/supervisor.json").read_text())["socket"]


# ------------------------------------------------------------------ polite stops


@pytest.mark.parametrize("shell", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_polite_stop(workshop: Workshop, number: int, shell: bool) -> None:
    """A stop signal loses no step and repeats none, also when the worker is a grandchild: 75, and
    the next launch goes on with the next step."""
    argv = (through_shell if shell else fake)("--total", str(TOTAL))
    launched = Launched(workshop, *argv)
    launched.wait_for("step 3")
    assert launched.signal(number).ends() == 75
    assert checkpoints(workshop)[-1] == launched.steps()[-1]
    finish(workshop, *argv)
    assert logged(workshop) == TO_THE_END


def test_flush_and_go_on(workshop: Workshop) -> None:
    """SIGUSR2 makes the state durable, and the job goes on."""
    launched = Launched(workshop, *fake())
    launched.wait_for("step 3")
    launched.signal(signal.SIGUSR2)
    made = wait_durable(launched, workshop)
    launched.wait_for_step(made + 3)
    assert launched.signal(signal.SIGTERM).ends() == 75
    assert checkpoints(workshop)[0] == made


def wait_durable(launched: Launched, workshop: Workshop) -> int:
    """The step of the newest durable checkpoint, as soon as there is one."""
    while True:
        facts = server.ask(address(workshop), "status").facts
        if facts["durable step"] is not None:
            return int(facts["durable step"])
        assert launched.process.poll() is None, launched.told()


def test_every(workshop: Workshop) -> None:
    """With --every, one becomes durable without being asked for, and old ones are dropped."""
    launched = Launched(workshop, *fake(), options=("--every", "0.02", "--keep", "2"))
    launched.wait_for("attached")
    first = wait_durable(launched, workshop)
    while checkpoints(workshop)[0] <= first:
        assert launched.process.poll() is None, launched.told()
    launched.signal(signal.SIGTERM).ends()
    assert launched.process.returncode == 75


def test_standing(workshop: Workshop) -> None:
    """A worker that answers that its last snapshot stands gets that one made durable."""
    launched = Launched(workshop, *fake("--held", "--standing"))
    launched.wait_for("step 3")
    assert launched.signal(signal.SIGTERM).ends() == 75
    assert checkpoints(workshop)[-1] == launched.steps()[-1]


def test_stays(workshop: Workshop) -> None:
    """A worker that does not end after its receipt is killed at the end of the grace: 75."""
    launched = Launched(workshop, *fake("--stay"), options=("--grace", "1"))
    launched.wait_for("step 3")
    processes = launched.descendants()
    assert launched.signal(signal.SIGTERM).ends() == 75
    assert checkpoints(workshop)[-1] == launched.steps()[-1]
    assert not any(is_alive(p.pid) for p in processes)


def test_a_worker_that_is_no_descendant(workshop: Workshop) -> None:
    """Behind `srun` somebody else starts it: it is killed, and waited for, with all the others."""
    waits = "import time; print('up', flush=True); time.sleep(600)"
    launched = Launched(workshop, sys.executable, "-c", waits, options=("--grace", "0.3"))
    launched.wait_for("up")
    (command,) = launched.descendants()
    worker = subprocess.Popen(fake("--held", "--deaf", "4"), env=command.environ())
    while server.ask(address(workshop), "status").facts["step"] != 4:
        assert worker.poll() is None
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert worker.poll() == -signal.SIGKILL
    assert checkpoints(workshop) == [4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_safe_point(workshop: Workshop, number: int) -> None:
    """A worker that reaches no safe point within the grace is killed, and the newest snapshot in
    memory becomes durable: 75."""
    launched = Launched(workshop, *fake("--held", "--deaf", "4"), options=("--grace", "0.3"))
    launched.wait_for("step 4")
    assert launched.signal(number).ends() == 75
    assert checkpoints(workshop) == [4]


def test_three_interrupts(workshop: Workshop) -> None:
    """The second Ctrl-C says what would be lost, the third one kills the job: 130."""
    launched = Launched(workshop, *fake("--deaf", "4"), options=("--grace", "1000"))
    launched.wait_for("step 4")
    processes = launched.descendants()
    launched.signal(signal.SIGINT).wait_for("SIGINT")
    launched.signal(signal.SIGINT).wait_for("still saving")
    assert all(is_alive(p.pid) for p in processes)
    assert launched.signal(signal.SIGINT).ends() == 130
    assert not any(is_alive(p.pid) for p in processes)


# ------------------------------------------------------------------ deaths


def test_killed_worker(workshop: Workshop) -> None:
    """A killed worker is started again from the newest snapshot in memory: no step is lost."""
    done = workshop.launch(*fake("--total", str(TOTAL), "--held", "--lives", "1", "--life", "7"))
    assert done.returncode == 0, done.stderr
    assert "signal 9 (SIGKILL) at step 7" in done.stderr
    assert logged(workshop) == TO_THE_END


def test_last_words(workshop: Workshop) -> None:
    """What a worker sent before it was killed counts, also when its death is seen first."""
    gate = workshop.path / "gate"
    argv = fake(*f"--total {TOTAL} --held --lives 1 --life 20 --gate {gate}".split())
    launched = Launched(workshop, *argv)
    launched.wait_for("step 3")
    (worker,) = launched.descendants()
    launched.signal(signal.SIGSTOP)
    gate.touch()
    while is_alive(worker.pid):
        time.sleep(0.01)
    launched.signal(signal.SIGCONT)
    assert launched.ends() == 0, launched.told()
    assert logged(workshop) == TO_THE_END


def test_progress_resets_the_count(workshop: Workshop) -> None:
    """Failures with progress between them never add up to giving up."""
    argv = fake("--total", str(TOTAL), "--held", "--lives", "8", "--life", "5")
    done = workshop.launch(*argv, options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert logged(workshop) == TO_THE_END


def test_no_progress(workshop: Workshop) -> None:
    """A worker that always dies at the same step is given up on: 70."""
    argv = fake("--lives", "99", "--life", "5")
    done = workshop.launch(*argv, options=("--max-restarts", "2"))
    assert done.returncode == 70
    assert logged(workshop) == [1, 2, 3, 4, 5] * 3
    assert "at step 5" in done.stderr


def test_hidden_death(workshop: Workshop) -> None:
    """A worker that was killed has not finished, even if the shell around it ends with 0."""
    argv = through_shell("--total", str(TOTAL), "--held", "--lives", "1", "--life", "7")
    done = workshop.launch(*argv)
    assert done.returncode == 0, done.stderr
    assert logged(workshop) == TO_THE_END


def test_ends_without_a_word(workshop: Workshop) -> None:
    """The command's own process is believed: a worker that exits with 0 has finished."""
    done = workshop.launch(*fake("--total", "5", "--mute"))
    assert done.returncode == 0, done.stderr
    assert logged(workshop) == [1, 2, 3, 4, 5]


def test_refused(workshop: Workshop) -> None:
    """What a worker says starting again would not help is not started again: 70, with its text."""
    done = workshop.launch(*fake("--refuse", "layer7.weight: shape (3,), expected (4,)"))
    assert done.returncode == 70
    assert "layer7.weight" in done.stderr
    assert done.stdout == "attached\n"


def test_says(workshop: Workshop) -> None:
    """What the worker says goes to standard error and into the journal."""
    done = workshop.launch(*fake("--total", "3", "--say", "a sampler was rebuilt"))
    assert "ckptd: a sampler was rebuilt\n" in done.stderr
    assert any(event.get("text") == "a sampler was rebuilt" for event in workshop.journal())


# ------------------------------------------------------------------ the supervisor's death


def test_killed_supervisor(workshop: Workshop) -> None:
    """After SIGKILL to the supervisor its worker still holds the job; the next launch gives it the
    grace, ends it, and goes on from what is durable. There are never two workers."""
    argv = fake("--total", "100000")
    launched = Launched(workshop, *argv)
    launched.wait_for("step 3")
    launched.signal(signal.SIGUSR2)
    durable = wait_durable(launched, workshop)
    orphans = launched.descendants()
    socket_of_the_killed = Path(address(workshop))
    launched.kill()
    again = Launched(workshop, *argv, options=("--grace", "0.3"))
    again.wait_for("was killed")
    again.wait_for("attached")
    assert not any(is_alive(p.pid) for p in orphans)
    again.wait_for_step(durable + 1)
    assert again.steps()[0] == durable + 1
    assert not socket_of_the_killed.parent.exists(), "each kill would leave a directory behind"
    assert again.signal(signal.SIGTERM).ends() == 75


def test_killed_supervisor_behind_a_shell(workshop: Workshop) -> None:
    """The same when the command's own process is gone and the worker is left."""
    argv = through_shell("--total", "100000")
    launched = Launched(workshop, *argv)
    launched.wait_for("step 3")
    launched.signal(signal.SIGSTOP)
    shell, *workers = launched.descendants()
    shell.kill()
    launched.kill()
    assert workers
    again = Launched(workshop, *argv, options=("--grace", "0.3"))
    again.wait_for("attached")
    assert not any(is_alive(p.pid) for p in workers)
    assert again.signal(signal.SIGTERM).ends() == 75


def test_orphan_ends_by_itself(workshop: Workshop) -> None:
    """A launch beside an orphaned worker waits for it, and starts when it has ended."""
    argv = fake("--deaf", "3")
    launched = Launched(workshop, *argv)
    launched.wait_for("step 3")
    orphans = launched.descendants()
    launched.kill()
    again = Launched(workshop, *argv, options=("--grace", "1000"))
    again.wait_for("was killed")
    for orphan in orphans:
        orphan.kill()
    wait_gone(orphans)
    again.wait_for("step 3")
    again.signal(signal.SIGINT).wait_for("saving")
    again.signal(signal.SIGINT).wait_for("still saving")
    assert again.signal(signal.SIGINT).ends() == 130


# ------------------------------------------------------------------ disks and other machines


def test_fenced(workshop: Workshop) -> None:
    """When a newer attempt was started elsewhere, this one publishes nothing and ends: 69."""
    launched = Launched(workshop, *fake())
    launched.wait_for("step 3")
    processes = launched.descendants()
    (workshop.path / "runs/job/attempts/000099").touch()
    assert launched.signal(signal.SIGUSR2).ends() == 69
    assert checkpoints(workshop) == []
    assert not any(is_alive(p.pid) for p in processes)


def test_disk_refuses(workshop: Workshop) -> None:
    """A state that can't be made durable is said; the job goes on; a stop then ends with 74, and
    when the disk takes it again, the next launch resumes from what was durable before."""
    argv = fake("--total", str(10**6))
    launched = Launched(workshop, *argv)
    launched.wait_for("step 3")
    launched.signal(signal.SIGUSR2)
    durable = wait_durable(launched, workshop)
    place = workshop.path / "runs/job/checkpoints"
    place.rename(place.with_name("away"))
    place.write_text("in the way")
    launched.signal(signal.SIGUSR2)
    launched.wait_for("could not make a checkpoint durable")
    launched.wait_for_step(launched.steps()[-1] + 3)
    assert launched.signal(signal.SIGTERM).ends() == 74
    assert f"checkpoint of step {durable} stands" in launched.told()
    assert "receipt NotDurable" in launched.output
    place.unlink()
    place.with_name("away").rename(place)
    again = Launched(workshop, *argv)
    again.wait_for_step(durable + 1)
    assert again.signal(signal.SIGTERM).ends() == 75
    assert again.steps()[0] == durable + 1


def test_disk_refuses_at_relaunch(workshop: Workshop) -> None:
    """When the run's directory can't be read at a relaunch, that is a failure like any other: the
    supervisor reports it and ends with 70, and leaves nothing running."""
    launched = Launched(workshop, *fake("--deaf", "3"), options=("--max-restarts", "1"))
    launched.wait_for("step 3")
    attempts = workshop.path / "runs/job/attempts"
    attempts.rename(attempts.with_name("away"))
    attempts.write_text("in the way")
    for process in launched.descendants():
        process.kill()
    assert launched.ends() == 70
    assert "Traceback" not in launched.told()


def test_damaged_checkpoint(workshop: Workshop) -> None:
    """A damaged newest checkpoint is named and set aside, and the older one is used."""
    argv = fake("--total", str(10**6))
    steps = []
    for _ in range(2):
        launched = Launched(workshop, *argv)
        launched.wait_for_step()
        assert launched.signal(signal.SIGTERM).ends() == 75
        steps.append(launched.steps()[-1])
    state = workshop.path / f"runs/job/checkpoints/{steps[1]:09d}/state.json"
    state.write_bytes(state.read_bytes().replace(b"step", b"stop"))
    again = Launched(workshop, *argv)
    again.wait_for(f"{steps[1]:09d}.damaged")
    again.wait_for_step(steps[0] + 1)
    assert again.signal(signal.SIGTERM).ends() == 75
    assert again.steps()[0] == steps[0] + 1


def test_damage_that_only_the_worker_finds(workshop: Workshop) -> None:
    """What the supervisor read was sound, what the worker read was not: the same as above."""
    argv = fake("--total", str(10**6))
    for _ in range(2):
        launched = Launched(workshop, *argv)
        launched.wait_for_step()
        assert launched.signal(signal.SIGTERM).ends() == 75
    older, newest = checkpoints(workshop)
    doubts = fake("--total", str(10**6), "--doubts", f"{newest:09d}")
    again = Launched(workshop, *doubts, options=("--accept-changes",))
    assert "its tensors can't be read" in again.wait_for(f"{newest:09d}.damaged")
    again.wait_for_step(older + 1)
    assert again.signal(signal.SIGTERM).ends() == 75
    assert again.steps()[0] == older + 1


def test_a_name_that_was_damaged_comes_back_sound(workshop: Workshop) -> None:
    """The job comes to that step again: its new checkpoint is not taken for the damaged one."""
    argv = fake("--total", str(10**6))
    for _ in range(2):
        launched = Launched(workshop, *argv)
        launched.wait_for_step()
        assert launched.signal(signal.SIGTERM).ends() == 75
    older, newest = checkpoints(workshop)
    doubts = ("--doubts", f"{newest:09d}", "--doubts-until", "3")
    dies = ("--held", "--life", str(newest - older), "--lives", "4")
    options = ("--accept-changes", "--memory-tier", "off")
    again = Launched(workshop, *fake(*doubts, *dies), options=options)
    again.wait_for(f"{newest:09d}.damaged")
    again.wait_for(f"attempt 5, from step {newest}")
    again.wait_for_step(newest + 1)
    assert again.signal(signal.SIGTERM).ends() == 75
    assert again.told().count("was set aside") == 1


def test_a_stop_while_a_checkpoint_is_read(workshop: Workshop) -> None:
    """A large one takes longer to read than a host leaves: the supervisor hears it all the same."""
    argv = fake("--total", str(10**6))
    launched = Launched(workshop, *argv)
    launched.wait_for_step()
    assert launched.signal(signal.SIGTERM).ends() == 75
    (step,) = checkpoints(workshop)
    large(workshop.path / f"runs/job/checkpoints/{step:09d}")
    again = Launched(workshop, *argv)
    while not again.descendants():
        assert again.process.poll() is None, again.told()
    assert again.signal(signal.SIGTERM).ends() == 75, again.told()
    events = [event["event"] for event in workshop.journal()]
    assert events[-1] == "stopped"
    assert "set aside" not in events, "it was read to its end"
    assert "attached" not in events[events.index("stopped") :]


def large(checkpoint: Path) -> None:
    """Add a file to a checkpoint that takes minutes to read: a hole, with a sum that is wrong."""
    path, bytes_ = checkpoint / "manifest.json", 1 << 40
    manifest = manifests.decode(path.read_bytes(), str(path))
    os.truncate(os.open(checkpoint / "hole.safetensors", os.O_CREAT | os.O_WRONLY), bytes_)
    hole = manifests.File(bytes_, "0" * 32)
    files = {"hole.safetensors": hole, **manifest.files}
    path.write_bytes(manifests.encode(msgspec.structs.replace(manifest, files=files)))


def test_a_dying_process_writes_into_the_memory(workshop: Workshop) -> None:
    """What is in memory is compared with what was written of it before it is used: the disk is."""
    argv = fake("--life", "200", "--lives", "1", "--scribble")
    launched = Launched(workshop, *argv)
    launched.wait_for("step 3")
    launched.signal(signal.SIGUSR2)
    made = wait_durable(launched, workshop)
    assert f"the state of step {made} in memory" in launched.wait_for("is not what was written")
    launched.wait_for(f"attempt 2, from step {made}")
    launched.wait_for("step 201")
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert "from memory" not in "".join(launched.output)


def test_checkpoints_that_somebody_removed(workshop: Workshop) -> None:
    """It is said, and new ones are made from there on."""
    argv = fake("--life", "200", "--lives", "1")
    options = ("--every", "0.05", "--memory-tier", "off")
    launched = Launched(workshop, *argv, options=options)
    launched.wait_for("step 40")
    wait_durable(launched, workshop)
    gate = workshop.path / "runs/job/checkpoints"
    launched.process.send_signal(signal.SIGSTOP)  # nothing is written, and nobody started again
    while any(is_alive(p.pid) for p in launched.descendants()):
        time.sleep(0.01)
    shutil.rmtree(gate)
    launched.process.send_signal(signal.SIGCONT)
    launched.wait_for("somebody has removed it")
    launched.wait_for("attempt 2, from the beginning")
    while not checkpoints_there(gate):
        assert launched.process.poll() is None, launched.told()
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()


def checkpoints_there(path: Path) -> bool:
    return path.is_dir() and any(entry.name[0] != "." for entry in path.iterdir())


def test_the_directory_is_gone_before_the_worker_attaches(workshop: Workshop) -> None:
    """Nothing that is only written down for later ends the job; a stop then can't be durable."""
    gate = workshop.path / "gate"
    shell = f"until [ -e {gate} ]; do sleep 0.01; done; exec {sys.executable} {FAKE}"
    launched = Launched(workshop, "sh", "-c", shell)
    launched.wait_for("attempt 1")
    (workshop.path / "runs/job").rename(workshop.path / "runs/away")
    gate.touch()
    launched.wait_for("step 20")
    assert launched.signal(signal.SIGTERM).ends() == 74, launched.told()


def test_an_attempt_waits_for_its_directory(workshop: Workshop) -> None:
    """A crash while the run's directory is away: the state stays in memory until it is back."""
    argv = fake("--held", "--life", "30", "--lives", "1")
    launched = Launched(workshop, *argv, options=("--max-restarts", "1"))
    launched.wait_for("step 3")
    run, away = workshop.path / "runs/job", workshop.path / "runs/away"
    run.rename(away)
    launched.wait_for("step 30")
    for _ in range(3):  # more than it is restarted without progress
        launched.wait_for("a failure to start it")
        launched.messages.clear()
    away.rename(run)
    launched.wait_for("attempt 2, from step 30 in memory")
    launched.wait_for("step 35")
    assert launched.signal(signal.SIGTERM).ends() == 75, launched.told()
    assert launched.steps() == list(range(1, launched.steps()[-1] + 1))


# ------------------------------------------------------------------ the socket


def connected(workshop: Workshop) -> socket.socket:
    """A connection to the running supervisor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address(workshop))
    return connection


def test_ask(workshop: Workshop) -> None:
    """status, checkpoint and stop are answered; the latter two when it is done."""
    launched = Launched(workshop, *fake())
    seen = launched.wait_for_step()
    status = server.ask(address(workshop), "status")
    assert status.facts["state"] == "attached"
    assert status.facts["step"] >= seen
    made = server.ask(address(workshop), "checkpoint")
    assert made.ok, made.text
    newest = checkpoints(workshop)[-1]
    assert str(newest) in made.text
    assert not server.ask(address(workshop), "nonsense").ok
    stopped = server.ask(address(workshop), "stop")
    assert stopped.ok, stopped.text
    assert launched.ends() == 75
    assert checkpoints(workshop)[-1] == launched.steps()[-1]
    assert any(event["event"] == "asked to stop" for event in workshop.journal())


def test_second_worker(workshop: Workshop) -> None:
    """A second process that attaches in one attempt is turned away; the first is not disturbed."""
    launched = Launched(workshop, *fake())
    launched.wait_for("step 3")
    with connected(workshop) as connection:
        connection.send(wire.encode(wire.Hello(wire.PROTOCOL, os.getpid(), 0, 1, {})))
        answer = wire.decode_for_worker(connection.recv(wire.MESSAGE_BYTES_MAX))
    assert isinstance(answer, wire.TurnedAway)
    assert launched.signal(signal.SIGTERM).ends() == 75


@pytest.mark.parametrize("packet", [b"junk", b"{}", b'{"type":"Bye","finished":true}'])
def test_junk(workshop: Workshop, packet: bytes) -> None:
    """Whoever sends junk to the socket is dropped; the job is not disturbed."""
    launched = Launched(workshop, *fake())
    launched.wait_for("step 3")
    with connected(workshop) as connection:
        connection.send(packet)
        assert connection.recv(1) == b""
    assert launched.signal(signal.SIGTERM).ends() == 75


def test_a_snapshot_that_cannot_be_read(workshop: Workshop, tmp_path: Path) -> None:
    """It is said and not held; the job is not disturbed, and a later one is made durable."""
    launched = Launched(workshop, *fake("--held", "--garble", "5"))
    launched.wait_for("table can't be read")
    launched.wait_for("step 20")
    assert launched.signal(signal.SIGTERM).ends() == 75
    assert checkpoints(workshop)[-1] == launched.steps()[-1]


def test_a_last_snapshot_that_cannot_be_read(workshop: Workshop, tmp_path: Path) -> None:
    """At a stop it is no durable one, and the exit code says so."""
    gate = tmp_path / "gate"
    launched = Launched(workshop, *fake("--garble", "3", "--gate", str(gate)))
    launched.wait_for("step 3")
    launched.signal(signal.SIGTERM).wait_for("SIGTERM")
    gate.touch()
    assert launched.ends() == 74, launched.told()
    assert launched.wait_for("receipt") == "receipt NotDurable"


def test_nothing_left(workshop: Workshop) -> None:
    """After an orderly end the socket's directory and supervisor.json are gone."""
    launched = Launched(workshop, *fake())
    launched.wait_for("step 3")
    path = address(workshop)
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700  # noqa: PTH116, PTH120
    assert launched.signal(signal.SIGTERM).ends() == 75
    assert not os.path.exists(os.path.dirname(path))  # noqa: PTH110, PTH120
    assert not (workshop.path / "runs/job/supervisor.json").exists()
