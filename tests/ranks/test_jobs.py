"""Jobs of several ranks, interrupted in all the ways there are: they end bitwise as the plain run.

Three ranks at least, since two hide in which order gradients are summed. The script interrupts
itself at exact moments (tests/scripts/ranks.py), each time in a new process. Most cases run under a
launcher that forks its ranks (tests/scripts/forked.py), since torchrun imports torch once a rank.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import BOUND_S, SCRIPTS, Workshop
from launched import (
    Launched,
    checkpoints,
    no_leftovers,  # noqa: F401  # a fixture for every test here
    wait_gone,
)

pytestmark = pytest.mark.real

SCRIPT, FORKED = str(SCRIPTS / "ranks.py"), str(SCRIPTS / "forked.py")
RANKS = 3
LAUNCHES_MAX = 10
Plain = Callable[..., Path]


def forked(ranks: int = RANKS, script: str = SCRIPT) -> tuple[str, ...]:
    """The command, with ranks that are forks."""
    return sys.executable, FORKED, str(ranks), script, "out"


def torchrun(*options: str, ranks: int = RANKS) -> tuple[str, ...]:
    """The command under torchrun."""
    each = f"--nproc-per-node={ranks}"
    head = (sys.executable, "-m", "torch.distributed.run", "--standalone", each)
    return *head, *options, SCRIPT, "out"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """What the script writes without ckptd, by kind of model, loader workers and ranks."""
    known: dict[tuple[str, int, int], Path] = {}

    def run(variant: str = "", workers: int = 0, ranks: int = RANKS) -> Path:
        key = variant, workers, ranks
        if key not in known:
            path = tmp_path_factory.mktemp("plain")
            (path / "out").mkdir()
            environment = Workshop(path).environment(VARIANT=variant, WORKERS=str(workers))
            subprocess.run(forked(ranks), cwd=path, env=environment, check=True, timeout=BOUND_S)
            known[key] = path / "out"
        return known[key]

    return run


def interrupted(
    workshop: Workshop,
    argv: tuple[str, ...],
    strikes: str,
    *,
    options: tuple[str, ...] = (),
    **environment: str,
) -> tuple[list[int], str]:
    """Launch until it is over; the exit codes, and all that was said."""
    (workshop.path / "out").mkdir(exist_ok=True)
    codes, said = [], ""
    while codes[-1:] not in ([0], [70]) and len(codes) < LAUNCHES_MAX:
        done = workshop.launch(*argv, options=options, STRIKES=strikes, **environment)
        codes.append(done.returncode)
        said += done.stderr
    struck = len(list((workshop.path / "out").glob("struck-*")))
    assert struck == len(strikes.split(",")) or not strikes, f"{struck} of {strikes}: {said}"
    return codes, said


def is_that_of(workshop: Workshop, expected: Path, said: str = "") -> None:
    """Weights, optimizer, losses, generators and outputs of all ranks; and nobody is left."""
    out = workshop.path / "out"
    files = sorted(path.name for path in expected.iterdir())
    assert [name for name in files if not (out / name).exists()] == [], said
    differ = [one for one in files if (out / one).read_bytes() != (expected / one).read_bytes()]
    assert differ == [], said
    assert not [p for p in psutil.process_iter() if is_in(p, workshop.path)]


def is_in(process: psutil.Process, path: Path) -> bool:
    try:
        return Path(process.cwd()) == path
    except psutil.Error:
        return False


def steps(workshop: Workshop, event: str) -> list[object]:
    return [one.get("step") for one in workshop.journal() if one["event"] == event]


# ------------------------------------------------------------------ together


def test_one_thing_after_another(workshop: Workshop, plain: Plain) -> None:
    """Stopped after the very first iteration, when buckets are not laid out anew yet; the
    supervisor killed; stopped in mid-accumulation; an exception; stopped in the evaluation; exits;
    stopped where the next step leaves every rank its own buffers; killed: each in another rank, and
    each continued."""
    strikes = (
        "0.1@2:TERM, 0.3@0:supervisor, 1.0@1:USR1, 1.2@2:raise, 1.eval.0@0:TERM, 2.1@1:exit, "
        "2.3@2:INT, 2.eval.0@1:KILL"
    )
    codes, said = interrupted(workshop, forked(), strikes)
    assert codes == [75, -9, 75, 75, 75, 0], said
    is_that_of(workshop, plain(), said)


def test_torchrun(workshop: Workshop, plain: Plain) -> None:
    """Under torchrun, with loader workers: stopped, and a rank killed, whose death makes torchrun
    signal the others; that is no request to stop."""
    codes, said = interrupted(workshop, torchrun(), "0.2@1:TERM, 1.2@2:KILL", WORKERS="1")
    assert codes == [75, 0], said
    is_that_of(workshop, plain(workers=1), said)
    exits = [one for one in workshop.journal() if one["event"] == "exited" and one["code"]]
    assert [one["cause"] for one in exits] == ["rank 2 of 3 ended first"]


# ------------------------------------------------------------------ one by one

STOPS = ["0.0", "0.1", "0.5", "0.end", "1.2", "1.3", "1.eval.0", "1.eval.1", "2.5", "2.eval.1"]


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("moment", STOPS)
def test_stopped(workshop: Workshop, plain: Plain, moment: str, workers: int) -> None:
    """Stopped at any moment, it continues bit for bit."""
    strikes = f"{moment}@{STOPS.index(moment) % RANKS}:TERM"
    codes, said = interrupted(workshop, forked(), strikes, WORKERS=str(workers))
    assert codes in ([75, 0], [0]), said
    is_that_of(workshop, plain(workers=workers), said)


@pytest.mark.nightly
def test_stopped_in_inference_mode(workshop: Workshop, plain: Plain) -> None:
    """What is made at the resume point there is not for inference alone."""
    codes, said = interrupted(workshop, forked(), "1.eval.0@0:TERM", VARIANT="inference")
    assert codes == [75, 0], said
    is_that_of(workshop, plain("inference"), said)


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["KILL", "raise", "exit", "launcher"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("launcher", [forked, torchrun], ids=["forked", "torchrun"])
def test_died(
    workshop: Workshop, plain: Plain, launcher: Callable[[], tuple[str, ...]], rank: int, what: str
) -> None:
    """Whoever dies, however: it is started again by itself and ends bitwise right."""
    codes, said = interrupted(workshop, launcher(), f"1.3@{rank}:{what}", WORKERS="1")
    assert codes == [0], said
    is_that_of(workshop, plain(workers=1), said)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "variant",
    ["", "two", "views", "branching", "branching kept", "late", "local buffers", "compressed"],
)
@pytest.mark.parametrize("ranks", [3, 4])
def test_kinds_of_models(workshop: Workshop, plain: Plain, variant: str, ranks: int) -> None:
    """Whatever there is to DistributedDataParallel: it continues bit for bit."""
    strikes = "0.1@1:TERM, 0.4@2:TERM, 0.done@0:TERM, 1.2@0:TERM, 1.5@1:KILL"
    codes, said = interrupted(workshop, forked(ranks), strikes, VARIANT=variant)
    assert codes[-1] == 0, said
    assert "may differ" not in said
    causes = [one["cause"] for one in workshop.journal() if one["event"] == "exited" if one["code"]]
    assert causes == [f"rank 1 of {ranks} ended first"]
    is_that_of(workshop, plain(variant, ranks=ranks), said)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("static", "DistributedDataParallel(static_graph=True) can't be given the buckets"),
        ("compressed untracked", "the state of the communication hook `compressed`"),
    ],
)
def test_what_is_not_exact_is_said(workshop: Workshop, variant: str, text: str) -> None:
    """What can't be brought back is named."""
    codes, said = interrupted(workshop, forked(), "0.3@1:TERM", VARIANT=variant)
    assert codes == [75, 0], said
    assert text in said


@pytest.mark.nightly
def test_a_rank_that_hangs(workshop: Workshop, plain: Plain) -> None:
    """The others wait for it in a collective: the job is killed and started again."""
    options = ("--hang-after", "4")
    codes, said = interrupted(workshop, forked(), "1.3@1:hang", options=options)
    assert codes == [0], said
    assert "the job hangs" in said
    is_that_of(workshop, plain(), said)


@pytest.mark.nightly
def test_a_rank_that_was_stopped(workshop: Workshop, plain: Plain) -> None:
    """SIGSTOP: asked to leave, no safe point comes. Nothing that was in memory is lost."""
    (workshop.path / "out").mkdir()
    environment = {"STRIKES": "1.1@0:USR2, 1.3@1:stop"}
    launched = Launched(workshop, *forked(), options=("--grace", "3"), **environment)
    launched.wait_for("rank 1 strikes: stop")
    processes = launched.descendants()
    assert launched.signal(signal.SIGTERM).ends() == 75
    assert "no safe point was reached" in launched.told()
    wait_gone(processes)
    assert checkpoints(workshop)
    codes, said = interrupted(workshop, forked(), "")
    assert codes == [0], said
    is_that_of(workshop, plain(), said)


# ------------------------------------------------------------------ the supervisor


@pytest.mark.nightly
def test_without_a_supervisor(workshop: Workshop, plain: Plain) -> None:
    """Killed, it leaves ranks that agree among themselves, save one checkpoint and end."""
    codes, said = interrupted(workshop, forked(), "0.2@1:USR2, 1.3@2:supervisor")
    assert codes == [-9, 0], said
    (restored,) = steps(workshop, "restored")
    assert int(str(restored)) >= 9, "what was done then was saved"
    is_that_of(workshop, plain(), said)


@pytest.mark.nightly
@pytest.mark.parametrize("word", ["stop", "checkpoint"])
def test_asked_from_the_command_line(workshop: Workshop, plain: Plain, word: str) -> None:
    """`ckptd stop` and `ckptd checkpoint` are answered when all ranks have saved."""
    (workshop.path / "out").mkdir()
    launched = Launched(workshop, *forked(), STRIKES="1.3@1:WAIT")
    launched.wait_for("rank 1 strikes: WAIT")
    runs = str(workshop.path / "runs")
    asked = workshop.run(sys.executable, "-m", "ckptd", word, "job", "--dir", runs)
    assert asked.returncode == 0, asked.stdout + asked.stderr + launched.told()
    assert launched.ends() == {"stop": 75, "checkpoint": 0}[word], launched.told()
    assert len(steps(workshop, "durable")) == 1
    if word == "stop":
        codes, said = interrupted(workshop, forked(), "")
        assert codes == [0], said
    is_that_of(workshop, plain(), launched.told())


# ------------------------------------------------------------------ what is refused


@pytest.mark.nightly
def test_another_number_of_ranks(workshop: Workshop, plain: Plain) -> None:
    """Refused with both numbers, and nothing is lost: with as many as before it continues."""
    (workshop.path / "out").mkdir()
    first = workshop.launch(*forked(), STRIKES="0.3@1:TERM")
    assert first.returncode == 75, first.stderr
    fewer = workshop.launch(*forked(2), options=("--accept-changes",))
    assert fewer.returncode == 70, fewer.stderr
    assert "the job is of 2 ranks now, and what it continues from of 3" in fewer.stderr
    codes, said = interrupted(workshop, forked(), "", options=("--accept-changes",))
    assert codes == [0], said
    is_that_of(workshop, plain(), said)


@pytest.mark.nightly
@pytest.mark.parametrize("moment", ["1.eval.0", "1.eval.1", "1.2"])
def test_an_evaluation_by_one_rank_alone(workshop: Workshop, plain: Plain, moment: str) -> None:
    """In a loop that the others don't have, and wait for: no checkpoint is made in there, but at
    the next place to which all come."""
    codes, said = interrupted(workshop, forked(), f"{moment}@0:TERM", VARIANT="alone")
    assert codes in ([75, 0], [0]), said
    is_that_of(workshop, plain("alone"), said)


@pytest.mark.nightly
def test_loops_that_are_not_the_same(workshop: Workshop) -> None:
    """Asked to stop in loops of their own, ranks go on to the one that they all have, and save."""
    line = f"RANK=$r WORLD_SIZE=2 {sys.executable} {SCRIPTS / 'apart.py'} &"
    argv = ("sh", "-c", f"for r in 0 1; do {line} done; wait")
    first = workshop.launch(*argv, options=("--grace", "100"))
    assert first.returncode == 75, first.stderr
    assert "the ranks do not go through the same loops" in first.stderr
    assert "no safe point was reached" not in first.stderr
    again = workshop.launch(*argv)
    assert again.returncode == 0, again.stderr
    assert [f"rank {rank} did 230" in again.stdout for rank in range(2)] == [True, True]
    (restored,) = steps(workshop, "restored")
    assert 30 < int(str(restored)) < 230


@pytest.mark.nightly
def test_one_rank_s_file_is_damaged(workshop: Workshop, plain: Plain) -> None:
    """The checkpoint is set aside as a whole, and the one before it used by all ranks."""
    (workshop.path / "out").mkdir()
    environment = {"STRIKES": "0.3@1:USR2, 1.2@1:TERM"}
    first = workshop.launch(*forked(), **environment)
    assert first.returncode == 75, first.stderr
    newest = max((workshop.path / "runs/job/checkpoints").iterdir())
    damaged = newest / "rank-2.state.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"0", b"1", 1))
    codes, said = interrupted(workshop, forked(), "")
    assert codes == [0], said
    assert "rank-2.state.json" in said
    assert len(steps(workshop, "set aside")) == 1
    is_that_of(workshop, plain(), said)


@pytest.mark.nightly
def test_restarts_by_torchrun(workshop: Workshop, plain: Plain) -> None:
    """--max-restarts above 0: what torchrun starts again is refused, with what to do, and the whole
    job is started again."""
    argv = torchrun("--max-restarts=1")
    codes, said = interrupted(workshop, argv, "0.1@0:USR2, 1.2@1:KILL")
    assert codes == [0], said
    is_that_of(workshop, plain(), said)


# ------------------------------------------------------------------ beginnings and ends


@pytest.mark.nightly
def test_ranks_that_start_apart(workshop: Workshop, plain: Plain) -> None:
    """Started by a shell, a while after one another, and stopped when only some are there."""
    (workshop.path / "out").mkdir()
    variables = "WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=29531"
    line = f"RANK=$r {variables} {sys.executable} {SCRIPT} out &"
    argv = ("sh", "-c", f"for r in 2 0 1; do {line} done; wait")
    strikes = "0.1@0:WAIT, 1.2@0:KILL, 2.1@1:KILL"
    launched = Launched(workshop, *argv, STRIKES=strikes)
    launched.wait_for("attached")
    code = launched.signal(signal.SIGTERM).ends()
    assert code in (75, 0, 143), launched.told()
    codes, said = interrupted(workshop, argv, strikes)
    assert codes[-1] == 0, said
    is_that_of(workshop, plain(), said)
