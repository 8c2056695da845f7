"""What the supervisor does next: `step(state, fact, now_s) -> (state, actions)`.

Rules:

1. Everything that decides lives here and in `policy`. The module is pure: no clock, no process, no
   file. `loop` tells it facts, which are in the past tense, and carries out its actions, which are
   orders.
2. Every (phase, fact) pair has an answer in `_ANSWERS`; where a fact changes nothing, the answer
   says why.
3. There are no timers. `deadline(state)` says until when the loop may sleep; then it tells
   `Ticked`. A phase that has a deadline ends at it.
4. What is true in one phase only is a field of that phase.
5. At most one snapshot is written at a time. `Ledger` knows what is held in memory, what is being
   written and what is durable; only `_publish_due` starts a write.

Theory of operation. A job's life is a chain of attempts:

    Pausing ──► Unattached ──► Attached ──► Flushing ──► Leaving ──► Ending ──► Saving ──► Ended
       ▲             │          │  ▼            │            │          │  ▲        │
       │             │          │ Inspecting ───┼────────────┼──────────┤  │        │
       └─────────────┴──────────┴───────────────┴────────────┴──────────┘  └────────┘
                       (a failure: kill what is left, save what is held, pause, start again)

- *Unattached*: the command runs and no worker of it has called `attach`. Maybe it is still
  importing, maybe it never will: signals are passed on to it, since there is nothing else that it
  understands.
- *Attached*: a worker runs. It is asked through its status page and never signalled.
- *Flushing*: it was asked to flush and leave. Ends with a receipt, with its death, or at the
  deadline.
- *Inspecting*: it made no progress for far too long; what its processes are doing is being written
  to the log, before they are killed.
- *Leaving*: the receipt was given; the processes have until the same deadline to end by themselves.
- *Ending*: everything that is left was killed; waits until the tree is gone.
- *Saving*: no process is left, and the newest whole snapshot is being made durable. After a failure
  it has all the time that there is, at a stop what the host or the user has left.
- *Ended*: nothing more will happen.

Why the processes are ended (`Purpose`) is carried from Ending through Saving to `_conclude`, the
one place that decides between relaunching and an exit code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from ckptd.supervisor import policy as policies
from ckptd.supervisor.policy import Exit, Policy

# The numbers of the signals that mean something here; they are the same on every Linux.
HUP, INT, KILL, USR1, USR2, TERM = 1, 2, 9, 10, 12, 15


# ------------------------------------------------------------------ facts


@dataclass(frozen=True, slots=True)
class Spawned:
    """The command was started."""


@dataclass(frozen=True, slots=True)
class Found:
    """The disk was looked at: what the command continues from, and how many checkpoints there are.

    Attributes:
        step: of the newest sound one that was not left out; None: there is none.
    """

    step: int | None
    checkpoints: int


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """The command could not be started.

    Attributes:
        disk: the disk refused, which is not the command's failure: it is tried again for ever.
    """

    why: str
    disk: bool = False


@dataclass(frozen=True, slots=True)
class WorkerAttached:
    """A process of the command called `attach` and was welcomed.

    Attributes:
        own: it is the command's own process, so that the command's exit status is its exit status.
    """

    own: bool = True


@dataclass(frozen=True, slots=True)
class WorkerDetached:
    """Its connection ended."""


@dataclass(frozen=True, slots=True)
class Sized:
    """The worker said about how many bytes a snapshot of its state will have."""

    length: int


@dataclass(frozen=True, slots=True)
class SnapshotCame:
    """A whole state is in memory.

    Attributes:
        asked: the request's serial; 0: it was not asked for.
        cost_s: for how long it held up training.
    """

    generation: int
    step: int
    asked: int
    cost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stood:
    """Asked, the worker said that a snapshot that it has sent before stands."""

    generation: int
    asked: int


@dataclass(frozen=True, slots=True)
class WorkerRefused:
    """The worker says that starting again would not help."""

    text: str


@dataclass(frozen=True, slots=True)
class WorkerSaidBye:
    """The worker's interpreter ends in order; `finished`: the script came to its end."""

    finished: bool


@dataclass(frozen=True, slots=True)
class Published:
    """A snapshot is durable; `took_s`: for how long it was written."""

    generation: int
    step: int
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """A snapshot could not be made durable; `fenced`: a newer attempt runs elsewhere."""

    generation: int
    why: str
    fenced: bool


@dataclass(frozen=True, slots=True)
class Exited:
    """The command ended.

    Attributes:
        code: its exit status, or minus the signal.
        step: where it was.
        cause: what else is known of its end, for a person.
    """

    code: int
    step: int
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Stalled:
    """The worker has made no progress for longer than its own rhythm explains."""

    seconds: float
    step: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """One of several workers ended before its time, and the command runs still."""

    text: str
    step: int


@dataclass(frozen=True, slots=True)
class Inspected:
    """What the processes of a job that hangs are doing is in the log."""


@dataclass(frozen=True, slots=True)
class TreeGone:
    """No process of the job is left."""


@dataclass(frozen=True, slots=True)
class Signalled:
    """A signal came: to the supervisor, or (a notice) to the worker."""

    number: int


@dataclass(frozen=True, slots=True)
class HostLimited:
    """After a stop signal, the host said for how long it lets the job run still, and why not."""

    left_s: float
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer attempt of this job was started elsewhere."""

    why: str


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """The worker has no memory for another snapshot unless one is given back."""


@dataclass(frozen=True, slots=True)
class CheckpointAsked:
    """The owner asked for a checkpoint."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The job was asked to stop: by its owner, or (`by`) by notice of a cloud."""

    by: str = "ckptd stop"


@dataclass(frozen=True, slots=True)
class Ticked:
    """The deadline is reached, or the loop just looked at the clock; `step`: where the job is."""

    step: int


Fact = (
    Spawned
    | Found
    | SpawnFailed
    | WorkerAttached
    | WorkerDetached
    | Sized
    | SnapshotCame
    | Stood
    | WorkerRefused
    | WorkerSaidBye
    | Published
    | PublishFailed
    | Exited
    | Stalled
    | WorkerLost
    | Inspected
    | TreeGone
    | Signalled
    | HostLimited
    | Superseded
    | MemoryShort
    | CheckpointAsked
    | StopAsked
    | Ticked
)
FACTS: Final[tuple[type, ...]] = Fact.__args__


# ------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the command as the next attempt.

    Attributes:
        memory: the held snapshot to restore; None: the newest sound checkpoint is.
        older: the checkpoint before the newest one is to be restored instead.
    """

    memory: int | None = None
    older: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """Ask the worker to flush; `leave`: and to wait for the receipt and exit."""

    serial: int
    leave: bool


@dataclass(frozen=True, slots=True)
class PassSignal:
    """Send a signal to the command's own process."""

    number: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Make a held snapshot durable, in the background."""

    generation: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Let go of a held snapshot's memory."""

    generation: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """Tell the worker what became of its snapshot; `why` None: durable."""

    generation: int
    why: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer everyone who asked for a checkpoint."""

    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Inspect:
    """Write into the log what every process of the job is doing."""


@dataclass(frozen=True, slots=True)
class KillTree:
    """Kill every process of the job that is left."""


@dataclass(frozen=True, slots=True)
class Note:
    """Write into the journal."""

    event: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the user, on stderr."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The supervisor's work is done."""

    code: int


Action = (
    Spawn
    | Request
    | PassSignal
    | Publish
    | Forget
    | Receipt
    | Answer
    | Inspect
    | KillTree
    | Note
    | Say
    | End
)


# ------------------------------------------------------------------ why processes are ended


class Why(Enum):
    """Why the processes are being ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    REFUSED = "refused"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Purpose:
    """Why the processes are being ended, and what that is to end in.

    Attributes:
        text: for a person: "signal 9 (SIGKILL)", "SIGTERM".
        code: the exit code that a stop is to end with, when what was held is durable.
    """

    why: Why
    text: str
    code: int = Exit.INTERRUPTED


# ------------------------------------------------------------------ phases


@dataclass(frozen=True, slots=True)
class Pausing:
    """Nothing runs; the command is started at the deadline.

    Attributes:
        older: from the checkpoint before the newest one, which is suspected.
    """

    deadline_s: float
    older: bool = False


@dataclass(frozen=True, slots=True)
class Unattached:
    """The command runs, no worker is attached.

    Attributes:
        deadline_s: when it is killed, after it was asked to stop; None: it was not.
        stop: the signal (or command) that asked it to.
    """

    deadline_s: float | None = None
    stop: str = ""


@dataclass(frozen=True, slots=True)
class Attached:
    """A worker runs.

    Attributes:
        flush_s: when the next checkpoint is due; infinite while one is under way.
        hold_s: when the next snapshot into memory is due; infinite while one is, or none is wanted.
    """

    flush_s: float
    hold_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Flushing:
    """The worker was asked to flush and leave.

    Attributes:
        stop: who asked: a signal's name, "ckptd stop".
        serial: of the request.
        answer: the snapshot that answers it, once it is known.
        interrupts: how often Ctrl-C was pressed.
    """

    deadline_s: float
    stop: str
    serial: int
    interrupts: int
    answer: int | None = None


@dataclass(frozen=True, slots=True)
class Inspecting:
    """It hangs: what its processes are doing is being written to the log, until the deadline."""

    deadline_s: float
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Leaving:
    """The worker has its receipt; the processes may end by themselves until the deadline."""

    deadline_s: float
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Ending:
    """What was left was killed."""

    deadline_s: float
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Saving:
    """Nothing runs; what was held in memory is being made durable.

    Attributes:
        interrupts: how often Ctrl-C was pressed since the job was asked to stop.
    """

    deadline_s: float
    purpose: Purpose
    interrupts: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """It is over."""

    code: int


Phase = Pausing | Unattached | Attached | Flushing | Inspecting | Leaving | Ending | Saving | Ended
PHASES: Final[tuple[type, ...]] = Phase.__args__


# ------------------------------------------------------------------ state


@dataclass(frozen=True, slots=True)
class Held:
    """A whole snapshot in memory; `due`: it is to be made durable; `durable`: it is already."""

    generation: int
    step: int
    due: bool
    durable: bool = False


@dataclass(frozen=True, slots=True)
class Ledger:
    """What is in memory, what is being written, what is durable.

    Generations go on over the attempts of one supervisor.

    Attributes:
        held: the newest whole snapshot, unless that is just being written. It is kept when it is
            durable, too, for an attempt that has to start again.
        durable_step: the newest durable state's step; None: there is none.
        durable_generation: the newest snapshot that is durable; 0: none.
        checkpoints: how many checkpoints there are.
        failed: why the newest write failed; None: it did not.
        failures: writes that failed since the last one that did not.
    """

    held: Held | None = None
    writing: Held | None = None
    durable_step: int | None = None
    durable_generation: int = 0
    checkpoints: int = 0
    failed: str | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """All that the machine knows.

    Attributes:
        ever_attached: whether the command is known to be a ckptd worker.
        failures: failures in a row without progress between them.
        failed_step: the step of the last failure; None: none yet.
        crash: step and kind of the last crash.
        crashes: how often in a row it was the same.
        doubted: the newest checkpoint was suspected, and the one before it tried.
        serial: of the last request.
        wanted: serial of the newest request whose answer is to be made durable; 0: it came.
        hold_every_s: how long to train between two snapshots into memory.
        asked: whether somebody waits for an answer to `ckptd checkpoint`.
        refused: what a worker said when it refused to go on in this attempt.
        unfinished: of this attempt's worker it is known that it has not finished; or it has not
            said so, and the command's exit status is not its own (a shell may hide its death).
        keeps: whether a snapshot is kept in memory when it is durable.
        granted_s: the grace of the stop under way where the host knows it; None: the policy's.
        write_s: how long the newest write took; 0: there was none.
        length: about how many bytes a snapshot has; 0: not known yet.
    """

    policy: Policy
    phase: Phase
    ledger: Ledger = field(default_factory=Ledger)
    ever_attached: bool = False
    failures: int = 0
    failed_step: int | None = None
    crash: tuple[int, str] | None = None
    crashes: int = 0
    doubted: bool = False
    serial: int = 0
    wanted: int = 0
    hold_every_s: float = policies.HOLD_S_MIN
    asked: bool = False
    refused: str | None = None
    unfinished: bool = False
    keeps: bool = True
    granted_s: float | None = None
    write_s: float = 0.0
    length: int = 0


Turn = tuple[State, list[Action]]


def begin(
    policy: Policy,
    now_s: float,
    *,
    durable_step: int | None,
    ever_attached: bool,
    checkpoints: int = 0,
) -> State:
    """The state of a supervisor that has just taken over its job: the first start is due at once.

    Args:
        policy: what the user set.
        now_s: the monotonic clock.
        durable_step: the step of the newest sound checkpoint.
        ever_attached: whether an earlier supervisor saw a worker of this command.
        checkpoints: how many checkpoints there are.
    """
    ledger = Ledger(durable_step=durable_step, checkpoints=checkpoints)
    return State(policy, Pausing(now_s), ledger, ever_attached, keeps=policy.memory_tier)


def deadline(state: State) -> float | None:
    """Until when nothing has to happen by itself; None: for ever."""
    phase = state.phase
    if isinstance(phase, Ended):
        return None
    if isinstance(phase, Attached):
        due_s: float | None = min(phase.flush_s, phase.hold_s)
    elif isinstance(phase, Flushing):
        due_s = _waits_until_s(state, phase)
    else:
        due_s = phase.deadline_s
    return None if due_s is None or math.isinf(due_s) else due_s


def step(state: State, fact: Fact, now_s: float) -> Turn:
    """What the supervisor does when it learns a fact."""
    return _ANSWERS[type(state.phase), type(fact)](state, state.phase, fact, now_s)


# ------------------------------------------------------------------ the ledger


def _publish_due(state: State) -> Turn:
    """Start writing what is due, unless something is being written."""
    ledger = state.ledger
    if ledger.writing is not None or ledger.held is None or not ledger.held.due:
        return state, []
    held = ledger.held
    return _with(state, writing=held, held=None), [Publish(held.generation)]


def _with(state: State, **changes: Any) -> State:
    return replace(state, ledger=replace(state.ledger, **changes))


def _hold(state: State, fact: SnapshotCame) -> Turn:
    """Keep the newest snapshot. One that is due stays due: the newer one is written instead."""
    old = state.ledger.held
    due = _answers(state, fact.asked) or (old is not None and old.due)
    actions: list[Action] = [] if old is None else [Forget(old.generation)]
    state = _with(state, held=Held(fact.generation, fact.step, due))
    state = replace(state, wanted=0 if due else state.wanted)
    state, more = _publish_due(state)
    return state, actions + more


def _answers(state: State, asked: int) -> bool:
    """Whether an answer is one that is to be made durable. A later request covers an older one."""
    return 0 < state.wanted <= asked


def _stand(state: State, fact: Stood) -> Turn:
    """A snapshot that was sent before is due now. It may be durable already."""
    if not _answers(state, fact.asked):
        return state, []
    state = replace(state, wanted=0)
    ledger = state.ledger
    if ledger.durable_generation >= fact.generation:
        actions = [Receipt(fact.generation, None), *_tell_asker(state, ok=True)]
        return replace(state, asked=False), actions
    if ledger.held is not None:
        state = _with(state, held=replace(ledger.held, due=True))
    return _publish_due(state)


def _book(state: State, fact: Published) -> Turn:
    """A write is done: its receipt, and the next write.

    The snapshot stays until there is a newer one: who has to start again starts from memory.
    """
    written, held = state.ledger.writing, state.ledger.held
    failed_before = state.ledger.failed is not None
    kept = state.keeps and held is None and written is not None
    if kept and written is not None:
        held = replace(written, due=False, durable=True)
    state = _with(
        state,
        writing=None,
        held=held,
        durable_step=fact.step,
        durable_generation=fact.generation,
        checkpoints=min(state.ledger.checkpoints + 1, state.policy.keep),
        failed=None,
        failures=0,
    )
    actions: list[Action] = [
        Note("durable", {"step": fact.step, "seconds": round(fact.took_s, 3)}),
        Receipt(fact.generation, None),
        *([] if kept else [Forget(fact.generation)]),
        *_tell_asker(state, ok=True),
    ]
    if failed_before:
        actions.append(Say(f"durable again, at step {fact.step}"))
    state = replace(state, asked=False, write_s=fact.took_s)
    state, more = _publish_due(state)
    return state, actions + more


def _book_failure(state: State, fact: PublishFailed) -> Turn:
    """A write failed. The snapshot is kept in memory, unless a newer one is."""
    said = _kind(state.ledger.failed) == _kind(fact.why)
    failed = state.ledger.writing
    failures = state.ledger.failures + 1
    state = _with(state, writing=None, failed=fact.why, failures=failures)
    actions: list[Action] = [
        Note("not durable", {"why": fact.why}),
        Receipt(fact.generation, fact.why),
        *_tell_asker(state, ok=False),
    ]
    if not said:
        stands = _standing(state)
        actions.append(Say(f"could not make a checkpoint durable: {fact.why}. {stands}"))
    if failed is not None and state.ledger.held is None:
        state = _with(state, held=replace(failed, due=False))
    else:
        actions.append(Forget(fact.generation))
    return replace(state, asked=False), actions


def _give_back(state: State, phase: Phase, fact: MemoryShort, now_s: float) -> Turn:
    """There is not memory for two: from now on, what is durable is let go of."""
    held = state.ledger.held
    state = replace(state, keeps=False)
    if held is None or not held.durable:
        return state, []
    return _with(state, held=None), [Forget(held.generation)]


def _kind(why: str | None) -> str | None:
    """Why a write failed, whatever the step and the number of bytes."""
    return None if why is None else re.sub(r"\d+", "#", why)


def _tell_asker(state: State, *, ok: bool) -> list[Action]:
    if not state.asked:
        return []
    ledger = state.ledger
    if ok:
        return [Answer(ok=True, text=f"durable at step {ledger.durable_step}")]
    return [Answer(ok=False, text=f"not durable: {ledger.failed}. {_standing(state)}")]


def _standing(state: State) -> str:
    """Which checkpoint there is, for a person."""
    durable = state.ledger.durable_step
    if durable is None:
        return "There is no checkpoint yet"
    return f"The checkpoint of step {durable} stands"


# ------------------------------------------------------------------ ends


def _end_tree(state: State, purpose: Purpose, now_s: float) -> Turn:
    """Kill whatever is left, and wait for it to be gone."""
    return replace(state, phase=Ending(now_s + state.policy.kill_s, purpose)), [KillTree()]


def _after_tree(state: State, purpose: Purpose, now_s: float) -> Turn:
    """No process is left: save what is in memory, then conclude."""
    ledger = state.ledger
    actions: list[Action] = []
    lost = ledger.held is not None and not ledger.held.durable
    if ledger.held is not None and lost and purpose.why is not Why.FINISHED:
        newer = ledger.durable_step is None or ledger.held.step >= ledger.durable_step
        state = _with(state, held=replace(ledger.held, due=newer and purpose.why is not Why.FENCED))
        state, actions = _publish_due(state)
    if state.ledger.writing is None:
        state, more = _conclude(state, purpose, now_s)
        return state, actions + more
    # A failed job has all the time that there is, until somebody stops it.
    hurries = purpose.why not in (Why.FAILED, Why.REFUSED)
    until_s = _saves_until_s(state, now_s) if hurries else math.inf
    return replace(state, phase=Saving(until_s, purpose)), actions


def _saves_until_s(state: State, now_s: float) -> float:
    """Until when, at a stop, what was held may be written."""
    return now_s + (_write_s_max(state) if _is_free(state) else state.policy.grace_s)


def _is_free(state: State) -> bool:
    """Whether neither the host nor the user has limited the stop under way."""
    return state.granted_s is None and not state.policy.grace_given


def _write_s_max(state: State) -> float:
    """How long a write may take that nobody has limited."""
    return max(policies.WRITE_S_MAX, policies.WRITE_MARGIN * state.write_s, state.policy.grace_s)


def _conclude(state: State, purpose: Purpose, now_s: float) -> Turn:
    """The one place that decides between starting again and an exit code."""
    if purpose.why is Why.FINISHED:
        return _over(state, Exit.FINISHED, "finished", "finished")
    if purpose.why is Why.FENCED:
        return _over(state, Exit.LOCKED, "fenced", purpose.text)
    if purpose.why is Why.STOPPED:
        if state.ledger.failed is not None and purpose.code == Exit.INTERRUPTED:
            text = f"stopped ({purpose.text}), but the newest state is not durable: "
            return _over(
                state,
                Exit.NOT_DURABLE,
                "stopped",
                text + f"{state.ledger.failed}. {_standing(state)}",
            )
        return _over(
            state, purpose.code, "stopped", f"stopped ({purpose.text}). {_standing(state)}"
        )
    if purpose.why is Why.REFUSED:
        return _over(state, Exit.GAVE_UP, "gave up", purpose.text)
    if state.failures > state.policy.restarts_max:
        if state.crashes >= policies.SUSPECT_AFTER and not state.doubted and _has_older(state):
            return _doubt(state, purpose, now_s)
        text = (
            f"gave up after {state.failures} failures without progress between them, the last one "
            f"by {purpose.text} at step {state.failed_step}. {_standing(state)}"
        )
        return _over(state, Exit.GAVE_UP, "gave up", text)
    return _pause(state, purpose, now_s)


def _has_older(state: State) -> bool:
    held = state.ledger.held
    return state.ledger.checkpoints > 1 and (held is None or held.durable)


def _doubt(state: State, purpose: Purpose, now_s: float) -> Turn:
    """Maybe it is not the script: the checkpoint before the newest one is tried, once."""
    pause_s = state.policy.pause_s(state.failures)
    said = (
        f"{purpose.text} at step {state.failed_step}, {state.crashes} times in a row: the "
        f"checkpoint of step {state.ledger.durable_step} is suspected; the one before it is tried "
        f"once, in {pause_s:g} s (the suspected one is kept, as .superseded if that gets on)"
    )
    phase = Pausing(now_s + pause_s, older=True)
    state = replace(state, phase=phase, doubted=True, refused=None, unfinished=False)
    return state, [Note("suspected", {"step": state.ledger.durable_step}), Say(said)]


def _pause(state: State, purpose: Purpose, now_s: float) -> Turn:
    pause_s = state.policy.pause_s(max(state.failures, state.ledger.failures, 1))
    said = (
        f"the job ended by {purpose.text} at step {state.failed_step}; {_standing(state).lower()}; "
        f"starting it again in {pause_s:g} s ({state.failures} of {state.policy.restarts_max} "
        "restarts without progress)"
    )
    state = replace(state, phase=Pausing(now_s + pause_s), refused=None, unfinished=False)
    return state, [Say(said)]


def _over(state: State, code: int, event: str, text: str) -> Turn:
    held = state.ledger.held
    actions: list[Action] = [] if held is None else [Forget(held.generation)]
    if state.asked:
        actions.append(Answer(ok=False, text=f"the job ended: {text}"))
    actions += [Note(event, {"code": code, "text": text}), Say(text), End(code)]
    return replace(_with(state, held=None), phase=Ended(code), asked=False), actions


def _died(state: State, fact: Exited, now_s: float) -> Turn:
    """The command ended and nobody had asked it to."""
    note = _exit_note(fact)
    if fact.code == 0 and state.refused is None and not state.unfinished:
        state, actions = _end_tree(state, Purpose(Why.FINISHED, "finished"), now_s)
        return state, [note, *actions]
    if state.refused is not None:
        state, actions = _end_tree(state, Purpose(Why.REFUSED, state.refused), now_s)
        return state, [note, *actions]
    text = policies.described(fact.code)
    if fact.code == 0:
        text = "exit status 0, although its worker had not finished,"
    state = _count_failure(state, fact.step, text)
    text += f" ({fact.cause})" if fact.cause else ""
    state, actions = _end_tree(state, Purpose(Why.FAILED, text), now_s)
    return state, [note, *actions]


def _exit_note(fact: Exited) -> Note:
    cause = {"cause": fact.cause} if fact.cause else {}
    return Note("exited", {"code": fact.code, "step": fact.step, **cause})


def _count_failure(state: State, step: int, kind: str) -> State:
    at = max(step, state.failed_step or 0)
    failures = policies.failures_in_a_row(state.failures, at, state.failed_step)
    crash = step, kind
    return replace(
        state,
        failures=failures,
        failed_step=at,
        crash=crash,
        crashes=state.crashes + 1 if crash == state.crash else 1,
        doubted=state.doubted and failures > 1,
    )


# ------------------------------------------------------------------ answers: starting


def _start(state: State, phase: Pausing, fact: Ticked, now_s: float) -> Turn:
    if now_s < phase.deadline_s:
        return state, []
    held = state.ledger.held
    if phase.older:
        return replace(state, phase=Unattached(), wanted=0), [Spawn(older=True)]
    # What a dying process may have scribbled on is not tried twice, where there is another.
    from_disk = held is None or (held.durable and state.failures > 1)
    if held is not None and not held.durable:
        state = _with(state, held=replace(held, due=True))  # the disk may have come back
    state, actions = _publish_due(replace(state, phase=Unattached()))
    state = replace(state, wanted=0)  # the worker that was asked is gone
    # The attempt is claimed first: a write of an older one is refused.
    return state, [Spawn(None if held is None or from_disk else held.generation), *actions]


def _stop_while_pausing(state: State, phase: Pausing, fact: Fact, now_s: float) -> Turn:
    stop = _stop_name(fact)
    if stop is None:
        return state, []
    return _after_tree(state, Purpose(Why.STOPPED, stop), now_s)


def _found(state: State, phase: Unattached, fact: Found, now_s: float) -> Turn:
    """What is there counts, not what was written: it may be damaged, or gone."""
    return _with(state, durable_step=fact.step, checkpoints=fact.checkpoints), []


def _spawn_failed(state: State, phase: Unattached, fact: SpawnFailed, now_s: float) -> Turn:
    if fact.disk:
        state = _with(state, failures=state.ledger.failures + 1)
        return _end_tree(state, Purpose(Why.FAILED, fact.why), now_s)
    at = state.failed_step or 0
    failures = policies.failures_in_a_row(state.failures, at, state.failed_step)
    state = replace(state, failures=failures, failed_step=at)
    return _end_tree(state, Purpose(Why.FAILED, fact.why), now_s)


def _checkpoint_while_idle(state: State, phase: Phase, fact: Fact, now_s: float) -> Turn:
    return state, [Answer(ok=False, text=f"no worker is attached. {_standing(state)}")]


def _attached(state: State, phase: Unattached, fact: WorkerAttached, now_s: float) -> Turn:
    state = replace(state, ever_attached=True, unfinished=not fact.own)
    if phase.deadline_s is None:
        return replace(state, phase=Attached(now_s + state.policy.every_s)), []
    return _ask_to_leave(state, phase.stop, phase.deadline_s)


def _signal_unattached(state: State, phase: Unattached, fact: Signalled, now_s: float) -> Turn:
    own = state.policy.flush_signal
    if fact.number == USR2:
        if own is not None:
            return state, [PassSignal(own)]
        return state, [Say("SIGUSR2: no worker is attached yet, there is nothing to flush")]
    if phase.deadline_s is not None:
        return _press_unattached(state, phase, fact, now_s)
    return _ask_unattached(state, _stop_name(fact) or "", own or fact.number, now_s)


def _stop_unattached(state: State, phase: Unattached, fact: StopAsked, now_s: float) -> Turn:
    if phase.deadline_s is not None:
        return state, []
    return _ask_unattached(state, _stop_name(fact) or "", state.policy.flush_signal or TERM, now_s)


def _ask_unattached(state: State, stop: str, number: int, now_s: float) -> Turn:
    phase = Unattached(now_s + state.policy.grace_s, stop)
    return replace(state, phase=phase), [Note("asked to stop", {"by": stop}), PassSignal(number)]


def _press_unattached(state: State, phase: Unattached, fact: Signalled, now_s: float) -> Turn:
    if fact.number != INT:
        return state, []  # a second TERM is not "force": Slurm sends two
    return _end_tree(state, Purpose(Why.STOPPED, "a second Ctrl-C", 128 + INT), now_s)


def _tick_unattached(state: State, phase: Unattached, fact: Ticked, now_s: float) -> Turn:
    if phase.deadline_s is None or now_s < phase.deadline_s:
        return state, []
    purpose = Purpose(Why.STOPPED, phase.stop, _stop_code(state, -KILL))
    state, actions = _end_tree(state, purpose, now_s)
    return state, [Say(f"did not end within the grace of {_grace_s(state):g} s"), *actions]


def _exited_unattached(state: State, phase: Unattached, fact: Exited, now_s: float) -> Turn:
    if phase.deadline_s is None:
        return _died(state, fact, now_s)
    purpose = Purpose(Why.STOPPED, phase.stop, _stop_code(state, fact.code))
    state, actions = _end_tree(state, purpose, now_s)
    return state, [_exit_note(fact), *actions]


def _stop_code(state: State, code: int) -> int:
    """What a stop of a command without a worker ends with: 75 only if it is to be started again."""
    if state.ever_attached or state.policy.flush_signal is not None:
        return Exit.INTERRUPTED
    if code < 0 and state.policy.comes_back:
        return Exit.INTERRUPTED  # still importing: a scheduler's warning is no end
    return policies.exit_of(code)


# ------------------------------------------------------------------ answers: a worker runs


def _detached(state: State, phase: Attached, fact: WorkerDetached, now_s: float) -> Turn:
    return replace(state, phase=Unattached()), []


def _sized(state: State, phase: Attached, fact: Sized, now_s: float) -> Turn:
    # Nothing is measured yet, and the first one costs most: it fills memory that is new.
    every_s = state.policy.hold_every_s(fact.length / policies.FILL_RATE)
    state = replace(state, hold_every_s=every_s, length=fact.length)
    return replace(state, phase=replace(phase, hold_s=now_s + every_s)), []


def _tick_attached(state: State, phase: Attached, fact: Ticked, now_s: float) -> Turn:
    ledger = state.ledger
    flush = now_s >= phase.flush_s
    if flush and (ledger.durable_step is None or fact.step > ledger.durable_step):
        return _ask_to_flush(state, phase)
    if flush:
        phase = replace(phase, flush_s=now_s + state.policy.every_s)
    if now_s < phase.hold_s:
        return replace(state, phase=phase), []
    whole = (ledger.held, ledger.writing)
    newest = max([ledger.durable_step or 0, *(one.step for one in whole if one is not None)])
    both = ledger.writing is not None and ledger.held is not None
    if both or fact.step <= newest:
        # Both memories are in use, or there is nothing new.
        return replace(state, phase=replace(phase, hold_s=now_s + state.hold_every_s)), []
    phase = replace(phase, hold_s=math.inf)
    if not state.keeps:
        return replace(state, phase=phase), []
    serial = state.serial + 1
    return replace(state, serial=serial, phase=phase), [Request(serial, leave=False)]


def _ask_to_flush(state: State, phase: Attached) -> Turn:
    serial = state.serial + 1
    phase = replace(phase, flush_s=math.inf, hold_s=math.inf)
    state = replace(state, serial=serial, wanted=serial, phase=phase)
    return state, [Request(serial, leave=False)]


def _ask_to_leave(
    state: State, stop: str, deadline_s: float, interrupts: int = 0, *, passed: bool = True
) -> Turn:
    serial = state.serial + 1
    phase = Flushing(deadline_s, stop, serial, interrupts)
    state = replace(state, serial=serial, wanted=serial, phase=phase)
    note: list[Action] = [] if passed else [Note("asked to stop", {"by": stop})]
    return state, [*note, Request(serial, leave=True)]


def _signal_attached(state: State, phase: Attached, fact: Fact, now_s: float) -> Turn:
    stop = _stop_name(fact)
    if stop is None:
        return _ask_to_flush(state, phase)
    interrupts = int(isinstance(fact, Signalled) and fact.number == INT)
    deadline_s = now_s + state.policy.grace_s
    state, actions = _ask_to_leave(state, stop, deadline_s, interrupts, passed=False)
    return state, [*actions, Say(f"{stop}: saving the job, then leaving")]


def _checkpoint_attached(
    state: State,
    phase: Attached,
    fact: CheckpointAsked,
    now_s: float,
) -> Turn:
    return _ask_to_flush(replace(state, asked=True), phase)


def _snapshot(state: State, phase: Phase, fact: SnapshotCame, now_s: float) -> Turn:
    return _hold(state, fact)


def _snapshot_attached(state: State, phase: Attached, fact: SnapshotCame, now_s: float) -> Turn:
    every_s = state.policy.hold_every_s(fact.cost_s)
    state = replace(state, hold_every_s=every_s, phase=replace(phase, hold_s=now_s + every_s))
    return _hold(state, fact)


def _stood(state: State, phase: Attached, fact: Stood, now_s: float) -> Turn:
    phase = replace(phase, hold_s=now_s + state.hold_every_s)
    if _answers(state, fact.asked) and state.ledger.durable_generation >= fact.generation:
        # Nothing will be written, so nothing else sets the next time.
        phase = replace(phase, flush_s=now_s + state.policy.every_s)
    return _stand(replace(state, phase=phase), fact)


def _published(state: State, phase: Attached, fact: Published, now_s: float) -> Turn:
    state, actions = _book(state, fact)
    return replace(state, phase=replace(phase, flush_s=now_s + state.policy.every_s)), actions


def _publish_failed(state: State, phase: Attached, fact: PublishFailed, now_s: float) -> Turn:
    if fact.fenced:
        return _fenced(state, fact, now_s)
    state, actions = _book_failure(state, fact)
    pause_s = min(state.policy.every_s, state.policy.pause_s(state.ledger.failures))
    return replace(state, phase=replace(phase, flush_s=now_s + pause_s)), actions


def _fenced(state: State, fact: PublishFailed, now_s: float) -> Turn:
    state = _with(state, writing=None, failed=fact.why)
    state, actions = _end_tree(state, Purpose(Why.FENCED, fact.why), now_s)
    return state, [Forget(fact.generation), *actions]


def _exited_attached(state: State, phase: Attached, fact: Exited, now_s: float) -> Turn:
    return _died(state, fact, now_s)


def _refused(state: State, phase: Phase, fact: WorkerRefused, now_s: float) -> Turn:
    return replace(state, refused=fact.text), []


def _said_bye(state: State, phase: Phase, fact: WorkerSaidBye, now_s: float) -> Turn:
    return replace(state, unfinished=not fact.finished), []


def _lost(state: State, phase: Unattached | Attached, fact: WorkerLost, now_s: float) -> Turn:
    """The other ranks wait for it, maybe for ever: the whole job is started again."""
    if state.refused is not None:
        purpose = Purpose(Why.REFUSED, state.refused)
    elif isinstance(phase, Unattached) and phase.deadline_s is not None:
        purpose = Purpose(Why.STOPPED, phase.stop)
    else:
        state = _count_failure(state, fact.step, fact.text)
        purpose = Purpose(Why.FAILED, fact.text)
    return _end_tree(state, purpose, now_s)


def _lost_flushing(state: State, phase: Flushing, fact: WorkerLost, now_s: float) -> Turn:
    state, actions = _end_tree(state, Purpose(Why.STOPPED, phase.stop), now_s)
    return state, [Say(f"no safe point will come: {fact.text}"), *actions]


# ------------------------------------------------------------------ answers: it hangs


def _stalled(state: State, phase: Attached, fact: Stalled, now_s: float) -> Turn:
    """First what everybody is doing, while they still do it; then it is a failure as any other."""
    text = f"a hang (no progress for {policies.duration(fact.seconds)})"
    state = _count_failure(state, fact.step, "a hang")
    inspecting = Inspecting(now_s + policies.INSPECT_S, Purpose(Why.FAILED, text))
    said = (
        f"no progress for {policies.duration(fact.seconds)} at step {fact.step}: the job hangs. "
        "What its processes are doing is written to the log; then they are killed"
    )
    return replace(state, phase=inspecting), [_hang_note(fact), Say(said), Inspect()]


def _hang_note(fact: Stalled) -> Note:
    return Note("hang", {"step": fact.step, "seconds": round(fact.seconds, 1)})


def _inspected(state: State, phase: Inspecting, fact: Inspected, now_s: float) -> Turn:
    return _end_tree(state, phase.purpose, now_s)


def _exited_inspecting(state: State, phase: Inspecting, fact: Exited, now_s: float) -> Turn:
    """It may have come to its end after all; what ended it otherwise is the hang."""
    if fact.code == 0 and state.refused is None and not state.unfinished:
        return _died(state, fact, now_s)
    state, actions = _end_tree(state, phase.purpose, now_s)
    return state, [_exit_note(fact), *actions]


def _stop_inspecting(state: State, phase: Inspecting, fact: Fact, now_s: float) -> Turn:
    stop = _stop_name(fact)
    return (state, []) if stop is None else _end_tree(state, Purpose(Why.STOPPED, stop), now_s)


def _tick_inspecting(state: State, phase: Inspecting, fact: Ticked, now_s: float) -> Turn:
    return _end_tree(state, phase.purpose, now_s) if now_s >= phase.deadline_s else (state, [])


# ------------------------------------------------------------------ answers: it is to leave


def _snapshot_flushing(state: State, phase: Flushing, fact: SnapshotCame, now_s: float) -> Turn:
    if fact.asked >= phase.serial:
        state = _answered(state, phase, fact.generation, now_s)
    return _hold(state, fact)


def _answered(state: State, phase: Flushing, generation: int, now_s: float) -> State:
    """The state is in memory; where nobody limits the stop, its write may take longer than that."""
    deadline_s = phase.deadline_s
    if _is_free(state):
        deadline_s = max(deadline_s, now_s + _write_s_max(state))
    return replace(state, phase=replace(phase, answer=generation, deadline_s=deadline_s))


def _stood_flushing(state: State, phase: Flushing, fact: Stood, now_s: float) -> Turn:
    if fact.asked >= phase.serial:
        if state.ledger.durable_generation >= fact.generation:
            state, actions = _stand(state, fact)
            return _leaving(state, phase, now_s), actions
        state = _answered(state, phase, fact.generation, now_s)
    return _stand(state, fact)


def _leaving(state: State, phase: Flushing, now_s: float) -> State:
    """All is done; what does not end by itself holds up the host's other jobs for nothing."""
    deadline_s = min(phase.deadline_s, now_s + state.policy.grace_s)
    purpose = Purpose(Why.STOPPED, phase.stop)
    return replace(state, phase=Leaving(deadline_s, purpose), asked=False)


def _published_flushing(state: State, phase: Flushing, fact: Published, now_s: float) -> Turn:
    state, actions = _book(state, fact)
    return (_leaving(state, phase, now_s) if fact.generation == phase.answer else state), actions


def _publish_failed_flushing(
    state: State, phase: Flushing, fact: PublishFailed, now_s: float
) -> Turn:
    if fact.fenced:
        return _fenced(state, fact, now_s)
    state, actions = _book_failure(state, fact)
    if fact.generation == phase.answer:
        return _leaving(state, phase, now_s), actions
    state, more = _publish_due(state)
    return state, actions + more


def _signal_flushing(state: State, phase: Flushing, fact: Signalled, now_s: float) -> Turn:
    if fact.number != INT:
        return state, []  # a second TERM is not "force": Slurm sends two
    interrupts = phase.interrupts + 1
    if interrupts > 2:  # flush, warning, kill
        return _end_tree(state, Purpose(Why.STOPPED, "a third Ctrl-C", 128 + INT), now_s)
    state = replace(state, phase=replace(phase, interrupts=interrupts))
    if interrupts == 1:
        return state, []
    return state, [
        Say(
            "still saving. A third Ctrl-C kills the job now and loses the steps since the last "
            f"checkpoint. {_standing(state)}"
        )
    ]


def _waits_until_s(state: State, phase: Flushing) -> float:
    """Until when to wait for a safe point: what is held in memory must still become durable."""
    held = state.ledger.held
    lost = phase.answer is None and held is not None and not held.durable
    return phase.deadline_s - _reserved_s(state) if lost else phase.deadline_s


def _reserved_s(state: State) -> float:
    """Time to keep free for a write before the deadline."""
    measured = state.write_s > 0
    write_s = state.write_s if measured else state.length / policies.WRITE_RATE
    reserved_s = policies.WRITE_MARGIN * write_s
    if measured and not _is_free(state):
        return reserved_s
    # It is a guess, or nobody is known to end the write: half of the time is for a safe point.
    return min(reserved_s, _grace_s(state) / 2)


def _tick_flushing(state: State, phase: Flushing, fact: Ticked, now_s: float) -> Turn:
    if now_s < _waits_until_s(state, phase):
        return state, []
    grace_s, held = _grace_s(state), state.ledger.held
    said = f"no safe point was reached within the grace of {grace_s:g} s"
    if phase.answer is not None:
        said = f"the checkpoint is not written yet after {grace_s:g} s"
    elif held is not None and not held.durable:
        reserved_s = _reserved_s(state)
        less = f", less {reserved_s:.2g} s for the write" if reserved_s else ""
        said += (
            f"{less}: the state of step {held.step}, in memory, is made durable instead; it costs "
            f"{max(0, fact.step - held.step)} steps"
        )
    state, actions = _end_tree(state, Purpose(Why.STOPPED, phase.stop), now_s)
    return state, [Say(said), *actions]


def _stalled_flushing(state: State, phase: Flushing, fact: Stalled, now_s: float) -> Turn:
    state, actions = _end_tree(state, Purpose(Why.STOPPED, phase.stop), now_s)
    return state, [_hang_note(fact), Say("no safe point will come: the job hangs"), *actions]


def _exited_flushing(state: State, phase: Flushing, fact: Exited, now_s: float) -> Turn:
    note = _exit_note(fact)
    finished = fact.code == 0 and not state.unfinished and state.refused is None
    if finished and phase.answer is None:
        purpose = Purpose(Why.FINISHED, "finished")  # it came to its end before a safe point
    else:
        purpose = Purpose(Why.STOPPED, phase.stop)
    state, actions = _end_tree(state, purpose, now_s)
    return state, [note, *actions]


def _exited_leaving(state: State, phase: Leaving, fact: Exited, now_s: float) -> Turn:
    state, actions = _end_tree(state, phase.purpose, now_s)
    return state, [_exit_note(fact), *actions]


def _tick_leaving(state: State, phase: Leaving, fact: Ticked, now_s: float) -> Turn:
    return _end_tree(state, phase.purpose, now_s) if now_s >= phase.deadline_s else (state, [])


# ------------------------------------------------------------------ answers: what the host says


def _grace_s(state: State) -> float:
    """How long the stop under way may take."""
    return state.policy.grace_s if state.granted_s is None else state.granted_s


def _limited(
    state: State, phase: Unattached | Flushing | Leaving, fact: HostLimited, now_s: float
) -> Turn:
    """The host's limit is the deadline; a grace that the user chose can only be shorter."""
    if phase.deadline_s is None:
        return state, []
    granted_s = round(policies.within(fact.left_s), 1)
    deadline_s = now_s + granted_s
    why = "" if fact.why is None else f"{fact.why}; "
    if state.policy.grace_given and phase.deadline_s <= deadline_s:
        return state, [Say(f"{why}the host leaves {fact.left_s:.0f} s, --grace is shorter")]
    state = replace(state, granted_s=granted_s, phase=replace(phase, deadline_s=deadline_s))
    said = f"{why}the host leaves {fact.left_s:.0f} s: the job has {granted_s:.0f} s"
    return state, [Say(said)]


def _superseded(state: State, phase: Phase, fact: Superseded, now_s: float) -> Turn:
    purpose = Purpose(Why.FENCED, fact.why)
    if isinstance(phase, Pausing):
        return _after_tree(state, purpose, now_s)
    if isinstance(phase, Ending | Saving):
        return replace(state, phase=replace(phase, purpose=purpose)), []
    return _end_tree(state, purpose, now_s)


# ------------------------------------------------------------------ answers: it is ending


def _tree_gone(state: State, phase: Ending, fact: TreeGone, now_s: float) -> Turn:
    return _after_tree(state, phase.purpose, now_s)


def _tick_ending(state: State, phase: Ending, fact: Ticked, now_s: float) -> Turn:
    if now_s < phase.deadline_s:
        return state, []
    # A process that SIGKILL can't end sits in the kernel. Never two workers: no relaunch then.
    purpose = phase.purpose
    said = f"a process of the job did not end within {state.policy.kill_s:g} s of SIGKILL"
    if purpose.why is Why.FAILED:
        purpose = Purpose(Why.REFUSED, f"{said}; not started again beside it")
    state, actions = _after_tree(state, purpose, now_s)
    return state, [Say(said), *actions]


def _published_ending(state: State, phase: Ending, fact: Published, now_s: float) -> Turn:
    return _book(state, fact)


def _publish_failed_ending(
    state: State,
    phase: Inspecting | Leaving | Ending,
    fact: PublishFailed,
    now_s: float,
) -> Turn:
    if fact.fenced:
        purpose = Purpose(Why.FENCED, fact.why)
        state = _with(state, writing=None, failed=fact.why)
        return replace(state, phase=replace(phase, purpose=purpose)), [Forget(fact.generation)]
    return _book_failure(state, fact)


def _published_saving(state: State, phase: Saving, fact: Published, now_s: float) -> Turn:
    state, actions = _book(state, fact)
    if state.ledger.writing is not None:
        return state, actions
    state, more = _conclude(state, phase.purpose, now_s)
    return state, actions + more


def _publish_failed_saving(state: State, phase: Saving, fact: PublishFailed, now_s: float) -> Turn:
    purpose = Purpose(Why.FENCED, fact.why) if fact.fenced else phase.purpose
    state, actions = _book_failure(state, fact)
    if state.ledger.held is not None and state.ledger.held.due:
        state, more = _publish_due(state)
        return replace(state, phase=replace(phase, purpose=purpose)), actions + more
    state, more = _conclude(state, purpose, now_s)
    return state, actions + more


def _tick_saving(state: State, phase: Saving, fact: Ticked, now_s: float) -> Turn:
    if now_s < phase.deadline_s:
        return state, []
    return _conclude(_with(state, failed="the write did not end in time"), phase.purpose, now_s)


def _stop_ending(state: State, phase: Ending, fact: Fact, now_s: float) -> Turn:
    """A stop while a failed attempt is cleared away: clear it away, then stop and not relaunch."""
    stop = _stop_name(fact)
    if stop is None or phase.purpose.why is not Why.FAILED:
        return state, []
    phase = replace(phase, purpose=Purpose(Why.STOPPED, stop))
    return replace(state, phase=phase), [Note("asked to stop", {"by": stop})]


def _stop_saving(state: State, phase: Saving, fact: Fact, now_s: float) -> Turn:
    """The same while its state is written; from then on that has not all the time there is."""
    stop = _stop_name(fact)
    if stop is None:
        return state, []
    if not math.isinf(phase.deadline_s):  # it was stopped before
        return _press_saving(state, phase, now_s) if stop == "SIGINT" else (state, [])
    failed = phase.purpose.why is Why.FAILED
    purpose = Purpose(Why.STOPPED, stop) if failed else phase.purpose
    phase = Saving(_saves_until_s(state, now_s), purpose)
    return replace(state, phase=phase), [
        Note("asked to stop", {"by": stop}),
        Say(f"{stop}: leaving, as soon as the state in memory is written"),
    ]


def _press_saving(state: State, phase: Saving, now_s: float) -> Turn:
    if phase.interrupts:
        return _conclude(_with(state, failed="its write was given up"), phase.purpose, now_s)
    return replace(state, phase=replace(phase, interrupts=1)), [
        Say(f"still writing. Another Ctrl-C gives that up. {_standing(state)}")
    ]


# ------------------------------------------------------------------ the table

Answerer = Callable[[State, Any, Any, float], Turn]


def _stop_name(fact: Fact) -> str | None:
    """Who asks the job to stop; None: the fact does not."""
    if isinstance(fact, StopAsked):
        return fact.by
    if isinstance(fact, Signalled) and fact.number != USR2:
        return policies.signal_name(fact.number)
    return None


def _ignored(why: str) -> Answerer:
    def answer(state: State, phase: Phase, fact: Fact, now_s: float) -> Turn:
        return state, []

    answer.__doc__ = why
    return answer


_LATE: Final = _ignored("it was told before this phase began, and is known")
_NO_CHILD: Final = _ignored("no child runs, so no child can have done it: a late echo of the last")
_NOT_SPAWNED: Final = _ignored("nothing was ordered to be started in this phase")
_NO_WRITE: Final = _ignored("nothing is being written in this phase")
_LEFT: Final = _ignored("the processes are being ended; their last words change nothing")
_RUNS: Final = _ignored("the tree is asked about only after a kill")
_NO_WORKER: Final = _ignored("no worker is attached whose progress could be missed")
_OVER: Final = _ignored("it is over")
_NO_GRACE: Final = _ignored("no worker is being waited for: there is no grace to limit")
_NO_DEADLINE: Final = _ignored("its deadline is kept: a second request does not shorten it")

_ANSWERS: dict[tuple[type, type], Answerer] = {
    **{(Ended, fact): _OVER for fact in FACTS},
    # -------- nothing runs
    **{(Pausing, fact): _NO_CHILD for fact in FACTS},
    (Pausing, Published): lambda state, _, fact, __: _book(state, fact),
    (Pausing, PublishFailed): lambda state, _, fact, __: _book_failure(state, fact),
    (Pausing, Ticked): _start,
    (Pausing, Signalled): _stop_while_pausing,
    (Pausing, StopAsked): _stop_while_pausing,
    (Pausing, CheckpointAsked): _checkpoint_while_idle,
    # -------- the command runs
    (Unattached, Spawned): _ignored("it was ordered when this phase began"),
    (Unattached, Found): _found,
    (Unattached, SpawnFailed): _spawn_failed,
    (Unattached, WorkerAttached): _attached,
    (Unattached, WorkerDetached): _ignored("no worker is attached"),
    (Unattached, Sized): _ignored("it tells how often to ask, and nobody is asked here"),
    (Unattached, SnapshotCame): _snapshot,
    (Unattached, Stood): lambda state, _, fact, __: _stand(state, fact),
    (Unattached, WorkerRefused): _refused,
    (Unattached, WorkerSaidBye): _said_bye,
    (Unattached, Published): lambda state, _, fact, __: _book(state, fact),
    (Unattached, PublishFailed): lambda state, _, fact, now_s: (
        _fenced(state, fact, now_s) if fact.fenced else _book_failure(state, fact)
    ),
    (Unattached, Exited): _exited_unattached,
    (Unattached, Stalled): _NO_WORKER,
    (Unattached, WorkerLost): _lost,
    (Unattached, Inspected): _LATE,
    (Unattached, TreeGone): _RUNS,
    (Unattached, Signalled): _signal_unattached,
    (Unattached, CheckpointAsked): _checkpoint_while_idle,
    (Unattached, StopAsked): _stop_unattached,
    (Unattached, Ticked): _tick_unattached,
    # -------- a worker runs
    (Attached, Spawned): _LATE,
    (Attached, Found): _NOT_SPAWNED,
    (Attached, SpawnFailed): _NOT_SPAWNED,
    (Attached, WorkerAttached): _ignored("the loop turns a second worker away"),
    (Attached, WorkerDetached): _detached,
    (Attached, Sized): _sized,
    (Attached, SnapshotCame): _snapshot_attached,
    (Attached, Stood): _stood,
    (Attached, WorkerRefused): _refused,
    (Attached, WorkerSaidBye): _said_bye,
    (Attached, Published): _published,
    (Attached, PublishFailed): _publish_failed,
    (Attached, Exited): _exited_attached,
    (Attached, Stalled): _stalled,
    (Attached, WorkerLost): _lost,
    (Attached, Inspected): _LATE,
    (Attached, TreeGone): _RUNS,
    (Attached, Signalled): _signal_attached,
    (Attached, CheckpointAsked): _checkpoint_attached,
    (Attached, StopAsked): _signal_attached,
    (Attached, Ticked): _tick_attached,
    # -------- it is to flush and leave
    (Flushing, Spawned): _LATE,
    (Flushing, Found): _NOT_SPAWNED,
    (Flushing, SpawnFailed): _NOT_SPAWNED,
    (Flushing, WorkerAttached): _ignored("the loop turns a second worker away"),
    (Flushing, WorkerDetached): _ignored("the command's exit tells what became of it"),
    (Flushing, Sized): _ignored("it is to leave: nothing more is asked"),
    (Flushing, SnapshotCame): _snapshot_flushing,
    (Flushing, Stood): _stood_flushing,
    (Flushing, WorkerRefused): _refused,
    (Flushing, WorkerSaidBye): _said_bye,
    (Flushing, Published): _published_flushing,
    (Flushing, PublishFailed): _publish_failed_flushing,
    (Flushing, Exited): _exited_flushing,
    (Flushing, Stalled): _stalled_flushing,
    (Flushing, WorkerLost): _lost_flushing,
    (Flushing, Inspected): _LATE,
    (Flushing, TreeGone): _RUNS,
    (Flushing, Signalled): _signal_flushing,
    (Flushing, CheckpointAsked): lambda state, *_: (replace(state, asked=True), []),
    (Flushing, StopAsked): _NO_DEADLINE,
    (Flushing, Ticked): _tick_flushing,
    # -------- it hangs
    **{(Inspecting, fact): _LATE for fact in FACTS},
    (Inspecting, SnapshotCame): _snapshot,
    (Inspecting, Stood): lambda state, _, fact, __: _stand(state, fact),
    (Inspecting, WorkerRefused): _refused,
    (Inspecting, WorkerSaidBye): _said_bye,
    (Inspecting, Published): lambda state, _, fact, __: _book(state, fact),
    (Inspecting, PublishFailed): _publish_failed_ending,
    (Inspecting, Exited): _exited_inspecting,
    (Inspecting, Inspected): _inspected,
    (Inspecting, Signalled): _stop_inspecting,
    (Inspecting, StopAsked): _stop_inspecting,
    (Inspecting, CheckpointAsked): _checkpoint_while_idle,
    (Inspecting, Ticked): _tick_inspecting,
    # -------- it has its receipt
    **{(Leaving, fact): _LEFT for fact in FACTS},
    (Leaving, SnapshotCame): _ignored("the receipt was given for an older one, which stands"),
    (Leaving, Published): lambda state, _, fact, __: _book(state, fact),
    (Leaving, PublishFailed): _publish_failed_ending,
    (Leaving, Exited): _exited_leaving,
    (Leaving, CheckpointAsked): _checkpoint_while_idle,
    (Leaving, StopAsked): _NO_DEADLINE,
    (Leaving, Signalled): _NO_DEADLINE,
    (Leaving, Ticked): _tick_leaving,
    # -------- what was left was killed
    **{(Ending, fact): _LEFT for fact in FACTS},
    (Ending, SnapshotCame): _snapshot,
    (Ending, Stood): lambda state, _, fact, __: _stand(state, fact),
    (Ending, Published): _published_ending,
    (Ending, PublishFailed): _publish_failed_ending,
    (Ending, TreeGone): _tree_gone,
    (Ending, Signalled): _stop_ending,
    (Ending, StopAsked): _stop_ending,
    (Ending, CheckpointAsked): _checkpoint_while_idle,
    (Ending, Ticked): _tick_ending,
    # -------- nothing runs, and what was held is written
    **{(Saving, fact): _NO_CHILD for fact in FACTS},
    (Saving, Published): _published_saving,
    (Saving, PublishFailed): _publish_failed_saving,
    (Saving, Signalled): _stop_saving,
    (Saving, StopAsked): _stop_saving,
    (Saving, CheckpointAsked): _checkpoint_while_idle,
    (Saving, Ticked): _tick_saving,
    # -------- what the host says
    **{(phase, HostLimited): _NO_GRACE for phase in PHASES if phase is not Ended},
    **{(phase, HostLimited): _limited for phase in (Unattached, Flushing, Leaving)},
    **{(phase, Superseded): _superseded for phase in PHASES if phase is not Ended},
    # -------- in every phase with processes
    **{(phase, MemoryShort): _give_back for phase in PHASES if phase is not Ended},
}
