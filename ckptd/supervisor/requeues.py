"""After an interruption: have the host start the job again, but not for ever.

Slurm's own MaxBatchRequeue counts launch failures only, so a job that is interrupted over and over
before it gets anywhere would go round in circles. The count lies in the run's directory, since each
round is another process. It is a precaution: a count that can't be read or written keeps no job out
of the queue.
"""

from __future__ import annotations

from collections.abc import Callable

from ckptd.errors import CkptdError
from ckptd.host.host import Host
from ckptd.supervisor.policy import Exit
from ckptd.supervisor.run import RequeuesFile, Run


def settle(
    run: Run,
    host: Host,
    code: int,
    *,
    progressed: bool,
    by_owner: bool,
    requeues_max: int,
    say: Callable[[str], None],
) -> int:
    """Ask the host to start an interrupted job again; the last thing that a supervisor does.

    Args:
        run: the run; nothing of its supervisor is open any more.
        host: what started us.
        code: what the supervisor ended with.
        progressed: whether a new step became durable under it.
        by_owner: whether it was the owner who stopped it, and starts it again when it is wanted.
        requeues_max: interruptions without progress between them before giving up.
        say: tells the user.

    Returns:
        The exit code.
    """
    if code != Exit.INTERRUPTED or not host.restarts:
        return code
    if by_owner:
        say("stopped by its owner: the job is not put back into the queue")
        return code
    before = _read(run, say)
    fruitless = 0 if progressed else before + 1
    gave_up = fruitless > requeues_max
    # Who starts the job again by hand has looked at it: the count starts anew.
    after = 0 if gave_up else fruitless
    if after != before:
        _write(run, after, say)
    if gave_up:
        times = "once" if fruitless == 1 else f"{fruitless} times in a row"
        say(
            f"gave up: interrupted {times} before a new step became durable. See what takes so "
            f"long with `ckptd logs {run.path.name}`"
        )
        # Before its answer nobody knows whether the host starts it again by itself.
        said = host.never_again()
        say(
            said
            or "the job is not put back into the queue: submit it again, with more time or a "
            "larger --max-requeues"
        )
        return Exit.GAVE_UP
    said = host.again()
    if said is not None:
        say(said)
    return code


def _read(run: Run, say: Callable[[str], None]) -> int:
    try:
        return run.requeues()
    except (CkptdError, OSError) as error:
        say(f"{error}; interruptions without progress are counted anew")
        return 0


def _write(run: Run, count: int, say: Callable[[str], None]) -> None:
    try:
        run.write(RequeuesFile(count))
    except OSError as error:
        say(f"{run.path / 'requeues.json'} can't be written, this one is not counted: {error}")
