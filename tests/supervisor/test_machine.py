"""The state machine: every pair is answered, and each answer is the one that was promised."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import msgspec
import pytest

from ckptd.supervisor import machine as m
from ckptd.supervisor.policy import (
    HOLD_S_MIN,
    WRITE_RATE,
    WRITE_S_MAX,
    Exit,
    Policy,
    at_stake,
    failures_in_a_row,
    space_short,
)

POLICY = Policy(every_s=300.0, grace_s=30.0, restarts_max=2, backoff_s=1.0)
NOW = 1000.0

STOPPED = m.Purpose(m.Why.STOPPED, "SIGTERM")
FAILED = m.Purpose(m.Why.FAILED, "signal 9 (SIGKILL)")
PHASES = (
    m.Pausing(NOW + 1),
    m.Unattached(),
    m.Unattached(NOW + 30, "SIGTERM"),
    m.Attached(NOW + 300),
    m.Attached(math.inf),
    m.Attached(NOW + 300, NOW + 5),
    m.Flushing(NOW + 30, "SIGTERM", 1, 0),
    m.Flushing(NOW + 30, "SIGINT", 1, 2, answer=1),
    m.Inspecting(NOW + 20, FAILED),
    m.Leaving(NOW + 30, STOPPED),
    m.Ending(NOW + 10, FAILED),
    m.Saving(math.inf, FAILED),
    m.Saving(NOW + 30, STOPPED),
    m.Ended(0),
)
FACTS = (
    m.Spawned(),
    m.Found(5, 1),
    m.SpawnFailed("no such file"),
    m.WorkerAttached(),
    m.WorkerDetached(),
    m.Sized(1 << 30),
    m.SnapshotCame(2, 20, 1),
    m.Stood(1, 1),
    m.WorkerRefused("it does not fit"),
    m.WorkerSaidBye(False),
    m.Published(1, 10),
    m.PublishFailed(1, "disk full", False),
    m.PublishFailed(1, "a newer attempt", True),
    m.Exited(1, 10),
    m.Exited(0, 10),
    m.Exited(-9, 10, "out of memory"),
    m.Stalled(1800.0, 10),
    m.WorkerLost("rank 1 of 2 ended first", 10),
    m.Inspected(),
    m.TreeGone(),
    *(m.Signalled(number) for number in (m.HUP, m.INT, m.USR1, m.USR2, m.TERM)),
    m.HostLimited(4.0),
    m.HostLimited(100.0),
    m.Superseded("a newer attempt"),
    m.MemoryShort(),
    m.CheckpointAsked(),
    m.StopAsked(),
    m.Ticked(10),
)


def at(phase: m.Phase, **ledger: object) -> m.State:
    return m.State(POLICY, phase, m.Ledger(**ledger), ever_attached=True, serial=1)


def after(state: m.State, *facts: m.Fact, now_s: float = NOW) -> tuple[m.State, list[m.Action]]:
    """The state after the facts, and all actions."""
    actions: list[m.Action] = []
    for fact in facts:
        state, more = m.step(state, fact, now_s)
        actions += more
    return state, actions


def replace_policy(**changes: object) -> Policy:
    return msgspec.structs.replace(POLICY, **changes)


def given(state: m.State) -> m.State:
    """The same, with a grace that the user has chosen."""
    return replace(state, policy=replace_policy(grace_given=True))


def ended(actions: list[m.Action]) -> list[int]:
    return [action.code for action in actions if isinstance(action, m.End)]


def test_every_pair_is_answered() -> None:
    """Nothing that can happen in any phase is forgotten."""
    assert {(p, f) for p in m.PHASES for f in m.FACTS} == set(m._ANSWERS)
    assert {type(phase) for phase in PHASES} == set(m.PHASES)
    assert {type(fact) for fact in FACTS} == set(m.FACTS)


@pytest.mark.parametrize("phase", PHASES, ids=str)
@pytest.mark.parametrize("fact", FACTS, ids=str)
def test_every_pair_gives_a_state(phase: m.Phase, fact: m.Fact) -> None:
    """Each answer is a state and orders; an ending one orders exactly one End."""
    held = m.Held(1, 10, due=True)
    for ledger in ({}, {"held": replace(held, due=False)}, {"writing": held, "durable_step": 5}):
        state, actions = m.step(at(phase, **ledger), fact, NOW)
        assert isinstance(state.phase, m.PHASES)
        assert all(isinstance(action, m.Action) for action in actions)
        if isinstance(state.phase, m.Ended) and not isinstance(phase, m.Ended):
            assert len(ended(actions)) == 1
            assert ended(actions)[0] in {*Exit, 128 + m.INT, 128 + m.KILL}
        else:
            assert not ended(actions)
        assert sum(isinstance(action, m.Publish) for action in actions) <= 1


@pytest.mark.parametrize("phase", PHASES, ids=str)
def test_a_due_tick_changes_something(phase: m.Phase) -> None:
    """No deadline can be reached twice: the loop never spins."""
    state = at(phase)
    due_s = m.deadline(state)
    if due_s is not None:
        again, _ = m.step(state, m.Ticked(10), due_s)
        next_s = m.deadline(again)
        assert again != state
        assert next_s is None or next_s > due_s
        assert m.step(state, m.Ticked(10), due_s - 0.001)[0] == state


def test_ignored_facts_say_why() -> None:
    """Where a fact changes nothing, the answer has a reason."""
    for pair, answer in m._ANSWERS.items():
        if answer.__qualname__.startswith("_ignored"):
            assert answer.__doc__, pair


# ------------------------------------------------------------------ polite stops


@pytest.mark.parametrize(
    "fact", [m.Signalled(n) for n in (1, 2, 10, 15)] + [m.StopAsked()], ids=str
)
def test_a_stop_flushes_and_leaves(fact: m.Fact) -> None:
    """Request, snapshot, publish, receipt, exit, tree gone: 75, in this order."""
    state, actions = after(at(m.Attached(NOW + 300)), fact)
    assert m.Request(2, leave=True) in actions
    state, actions = after(state, m.SnapshotCame(1, 50, 2))
    assert actions == [m.Publish(1)]
    state, actions = after(state, m.Published(1, 50))
    assert m.Receipt(1, None) in actions
    assert isinstance(state.phase, m.Leaving)
    state, actions = after(state, m.Exited(75, 50))
    assert m.KillTree() in actions
    assert not ended(actions)
    state, actions = after(state, m.TreeGone())
    assert ended(actions) == [Exit.INTERRUPTED]


def test_usr2_flushes_and_goes_on() -> None:
    """A checkpoint, a receipt, and the job runs on; the next one is due `every_s` later."""
    state, actions = after(at(m.Attached(NOW + 300)), m.Signalled(m.USR2))
    assert actions == [m.Request(2, leave=False)]
    assert m.deadline(state) is None
    state, _ = after(state, m.SnapshotCame(1, 50, 2), m.Published(1, 50))
    assert state.phase == m.Attached(NOW + 300, NOW + HOLD_S_MIN)
    assert state.ledger.durable_step == 50


def test_a_second_term_is_not_force() -> None:
    """Slurm sends TERM twice: the second changes nothing, nor does any further one."""
    flushing, _ = after(at(m.Attached(NOW + 300)), m.Signalled(m.TERM))
    for number in (m.TERM, m.HUP, m.USR1):
        assert after(flushing, *[m.Signalled(number)] * 3) == (flushing, [])


def test_three_interrupts() -> None:
    """Ctrl-C saves; the second one says what would be lost; the third kills: 130."""
    state, _ = after(at(m.Attached(NOW + 300), durable_step=40), m.Signalled(m.INT))
    state, actions = after(state, m.Signalled(m.INT))
    (said,) = actions
    assert "third Ctrl-C" in said.text
    assert "step 40" in said.text
    state, actions = after(state, m.Signalled(m.INT))
    assert m.KillTree() in actions
    assert ended(after(state, m.TreeGone())[1]) == [130]


def test_the_grace_ends_before_a_safe_point() -> None:
    """At the deadline the worker is killed and what is in memory is saved: 75."""
    state, _ = after(at(m.Attached(NOW + 300)), m.SnapshotCame(1, 40, 0), m.Signalled(m.TERM))
    state, actions = after(state, m.Ticked(50), now_s=NOW + 30)
    assert m.KillTree() in actions
    state, actions = after(state, m.TreeGone())
    assert actions == [m.Publish(1)]
    assert ended(after(state, m.Published(1, 40))[1]) == [Exit.INTERRUPTED]


def test_a_write_is_begun_in_time_for_the_deadline() -> None:
    """The newest state in memory gets twice the time that a write takes, whatever is waited for."""
    first = m.Signalled(m.USR2), m.SnapshotCame(1, 30, 2), m.Published(1, 30, 4.0)
    state, _ = after(given(at(m.Attached(NOW + 300))), *first)
    state, _ = after(state, m.SnapshotCame(2, 40, 0), m.Signalled(m.TERM))
    assert m.deadline(state) == NOW + 30 - 2 * 4.0
    state, actions = m.step(state, m.Ticked(55), NOW + 22)
    (said,) = [action.text for action in actions if isinstance(action, m.Say)]
    assert "the state of step 40" in said
    assert "costs 15 steps" in said
    assert m.Publish(2) in m.step(state, m.TreeGone(), NOW + 22)[1]


def test_a_safe_point_is_waited_for_where_nothing_is_held() -> None:
    """What is durable already needs no time of its own, and an answer is written to its end."""
    first = m.Signalled(m.USR2), m.SnapshotCame(1, 30, 2), m.Published(1, 30, 4.0)
    state, _ = after(given(at(m.Attached(NOW + 300))), *first)
    durable, _ = after(state, m.Signalled(m.TERM))
    assert m.deadline(durable) == NOW + 30
    answered, _ = after(durable, m.SnapshotCame(2, 40, 3))
    assert m.deadline(answered) == NOW + 30


def test_before_anything_was_written_its_time_is_guessed() -> None:
    """From the size, and never more than half of what there is: a safe point may come."""
    started = m.Sized(30 * int(WRITE_RATE)), m.SnapshotCame(1, 40, 0)
    state, _ = after(at(m.Attached(NOW + 300)), *started, m.Signalled(m.TERM))
    state, _ = after(state, m.HostLimited(105.0))
    assert m.deadline(state) == NOW + 100 - 50
    small = m.Sized(3 * int(WRITE_RATE)), m.SnapshotCame(1, 40, 0)
    state, _ = after(at(m.Attached(NOW + 300)), *small, m.Signalled(m.TERM), m.HostLimited(105.0))
    assert m.deadline(state) == NOW + 100 - 2 * 3


def test_a_write_that_nobody_limits_is_waited_for() -> None:
    """At a stop, when the state is in memory: neither the user nor the host gave a time."""
    state, _ = after(at(m.Attached(NOW + 300)), m.Signalled(m.TERM), m.SnapshotCame(1, 40, 2))
    assert m.deadline(state) == NOW + WRITE_S_MAX
    limited, _ = after(state, m.HostLimited(50.0))
    assert m.deadline(limited) == NOW + 45
    strict, _ = after(given(at(m.Attached(NOW + 300))), m.Signalled(m.TERM))
    assert m.deadline(after(strict, m.SnapshotCame(1, 40, 2))[0]) == NOW + 30
    left, _ = after(state, m.Published(1, 40))
    assert m.deadline(left) == NOW + 30, "nothing is left to be waited for so long"


def test_a_crash_leaves_all_the_time_to_write() -> None:
    """No grace ends the write of a failed job's state; a stop does, and two Ctrl-C do at once."""
    died = m.SnapshotCame(1, 40, 0), m.Exited(-9, 41), m.TreeGone()
    state, actions = after(at(m.Attached(NOW + 300)), *died)
    assert m.Publish(1) in actions
    assert m.deadline(state) is None
    assert isinstance(after(state, m.Published(1, 40))[0].phase, m.Pausing)
    stopped, _ = after(state, m.Signalled(m.INT))
    assert m.deadline(stopped) == NOW + WRITE_S_MAX
    assert ended(after(stopped, m.Published(1, 40))[1]) == [Exit.INTERRUPTED]
    warned, actions = after(stopped, m.Signalled(m.INT))
    assert not ended(actions)
    assert ended(after(warned, m.Signalled(m.INT))[1]) == [Exit.NOT_DURABLE]
    assert not ended(after(warned, m.Signalled(m.TERM))[1])


def test_a_warning_while_the_command_imports() -> None:
    """Under a scheduler that starts it again, death by that signal is an interruption: 75."""
    died = m.Signalled(m.USR1), m.Exited(-m.USR1, 0), m.TreeGone()
    fresh = replace(at(m.Unattached()), ever_attached=False)
    assert ended(after(fresh, *died)[1]) == [128 + m.USR1]
    under = replace(fresh, policy=replace_policy(comes_back=True))
    assert ended(after(under, *died)[1]) == [Exit.INTERRUPTED]


def test_what_is_found_counts() -> None:
    """Checkpoints that are gone are written again, not waited for until that step comes."""
    state, _ = after(at(m.Unattached(), durable_step=80), m.Found(None, 0), m.WorkerAttached())
    _, actions = after(state, m.Ticked(5), now_s=NOW + 300)
    assert actions == [m.Request(2, leave=False)]


def test_one_snapshot_into_memory_while_a_write_goes_on() -> None:
    """A disk that hangs for an hour is not to cost an hour: two memories are enough for one."""
    writing = m.Held(1, 10, due=True)
    state, actions = after(at(m.Attached(math.inf, NOW), writing=writing), m.Ticked(11))
    assert actions == [m.Request(2, leave=False)]
    state, actions = after(state, m.SnapshotCame(2, 11, 2, 0.1))
    assert actions == []
    _, actions = after(state, m.Ticked(20), now_s=NOW + 100)
    assert actions == []


def test_what_cannot_be_made_durable_at_a_stop() -> None:
    """One more try without the worker, then 74; the message names the checkpoint that stands."""
    failed = m.PublishFailed(1, "disk full", False)
    state, _ = after(at(m.Attached(NOW + 300), durable_step=30), m.Signalled(m.TERM))
    state, actions = after(state, m.SnapshotCame(1, 50, 2), failed)
    assert m.Receipt(1, "disk full") in actions
    state, actions = after(state, m.Exited(74, 50), m.TreeGone())
    assert m.Publish(1) in actions
    state, actions = after(state, failed)
    assert ended(actions) == [Exit.NOT_DURABLE]
    (text,) = [a.text for a in actions if isinstance(a, m.Say)]
    assert "disk full" in text
    assert "step 30 stands" in text


def test_a_finish_while_a_stop_is_pending_is_a_finish() -> None:
    """A script that comes to its end before a safe point has finished: 0."""
    state, _ = after(at(m.Attached(NOW + 300)), m.Signalled(m.TERM), m.Exited(0, 99))
    assert ended(after(state, m.TreeGone())[1]) == [Exit.FINISHED]


def test_a_standing_snapshot_is_published() -> None:
    """Asked within an evaluation: the snapshot of its entry becomes durable and is the answer."""
    state, actions = after(at(m.Attached(NOW + 300)), m.SnapshotCame(1, 40, 0))
    assert actions == []
    state, actions = after(state, m.Signalled(m.TERM), m.Stood(1, 2))
    assert m.Publish(1) in actions
    state, actions = after(state, m.Published(1, 40))
    assert isinstance(state.phase, m.Leaving)
    durable, _ = after(at(m.Attached(NOW), durable_generation=1), m.Signalled(m.TERM))
    assert isinstance(after(durable, m.Stood(1, 2))[0].phase, m.Leaving)


# ------------------------------------------------------------------ failures


def die(state: m.State, step: int, code: int = -9) -> tuple[m.State, list[m.Action]]:
    """A worker attaches, reaches a step and dies; its tree is gone."""
    state, _ = after(state, m.Spawned(), m.WorkerAttached())
    return after(state, m.WorkerDetached(), m.Exited(code, step), m.TreeGone())


def restart(state: m.State) -> m.State:
    due_s = m.deadline(state)
    assert due_s is not None
    state, actions = m.step(state, m.Ticked(0), due_s)
    assert actions == [m.Spawn()]
    return state


def test_restarts_back_off_and_give_up() -> None:
    """Pauses of 1, 2, … seconds; after `restarts_max` restarts without progress: 70, and why."""
    state = at(m.Unattached())
    for pause_s in (1.0, 2.0):
        state, actions = die(state, 7)
        assert m.deadline(state) == NOW + pause_s
        assert not any(isinstance(action, m.Spawn) for action in actions)
        state = restart(state)
    state, actions = die(state, 7)
    assert ended(actions) == [Exit.GAVE_UP]
    assert "signal 9 (SIGKILL) at step 7" in str(actions)


def test_progress_starts_the_count_anew() -> None:
    """Failures with steps between them never add up."""
    state = at(m.Unattached())
    for step in range(1, 20):
        state, actions = die(state, step)
        assert not ended(actions)
        state = restart(state)
    assert failures_in_a_row(5, 8, 7) == 1
    assert failures_in_a_row(5, 7, 7) == 6


def test_what_was_in_memory_is_saved_before_a_restart() -> None:
    """A worker that died is started again only after the newest whole snapshot is durable."""
    state, _ = after(at(m.Attached(NOW + 300)), m.SnapshotCame(1, 40, 0), m.SnapshotCame(2, 60, 0))
    state, actions = after(state, m.Exited(-11, 63))
    assert m.KillTree() in actions
    state, actions = after(state, m.TreeGone())
    assert actions == [m.Publish(2)]
    assert isinstance(state.phase, m.Saving)
    state, actions = after(state, m.Published(2, 60))
    assert isinstance(state.phase, m.Pausing)


def test_a_hang() -> None:
    """What everybody does is written down first; then it is killed, saved and started again."""
    state, _ = after(at(m.Attached(NOW + 300)), m.SnapshotCame(1, 40, 0))
    state, actions = after(state, m.Stalled(1800.0, 45))
    assert m.Inspect() in actions
    assert m.KillTree() not in actions
    assert "no progress for 30 min at step 45" in str(actions)
    state, actions = after(state, m.Inspected())
    assert actions == [m.KillTree()]
    state, actions = after(state, m.TreeGone())
    assert actions == [m.Publish(1)]
    state, _ = after(state, m.Published(1, 40))
    assert isinstance(state.phase, m.Pausing)
    assert (state.failures, state.failed_step) == (1, 45)


def test_a_hang_that_cannot_be_looked_into() -> None:
    """Whatever the look takes, the job is killed at its deadline."""
    state, _ = after(at(m.Attached(NOW + 300)), m.Stalled(1800.0, 45))
    due_s = m.deadline(state)
    assert due_s is not None
    assert m.KillTree() in m.step(state, m.Ticked(45), due_s)[1]


def test_a_hang_that_ends_by_itself() -> None:
    """A script that comes to its end after all has finished."""
    state, _ = after(at(m.Attached(NOW + 300)), m.Stalled(1800.0, 45), m.Exited(0, 50))
    assert ended(after(state, m.TreeGone())[1]) == [Exit.FINISHED]


def test_a_stop_of_a_job_that_hangs() -> None:
    """No safe point will come: it is not waited for, what is in memory is saved, 75."""
    state, _ = after(at(m.Attached(NOW + 300)), m.SnapshotCame(1, 40, 0))
    asked_first = m.Signalled(m.TERM), m.Stalled(1800.0, 45)
    for facts in (asked_first, asked_first[::-1]):
        stopped, actions = after(state, *facts)
        assert m.KillTree() in actions
        stopped, actions = after(stopped, m.TreeGone(), m.Published(1, 40))
        assert ended(actions) == [Exit.INTERRUPTED]


LOST = m.WorkerLost("rank 1 of 2 ended first", 45)


def test_a_rank_that_is_lost_is_a_failure() -> None:
    """The others may wait for it for ever: the whole is ended, saved and started again."""
    held = m.SnapshotCame(1, 40, 0)
    state, _ = after(at(m.Attached(NOW + 300)), held, m.WorkerDetached())
    state, actions = after(state, LOST)
    assert m.KillTree() in actions
    state, actions = after(state, m.TreeGone(), m.Published(1, 40))
    assert isinstance(state.phase, m.Pausing)
    assert state.failures == 1
    assert "rank 1 of 2 ended first at step 45" in str(actions)


def test_a_rank_that_is_lost_while_the_job_is_to_leave() -> None:
    """No safe point will come: what is in memory is saved, and it is a stop still."""
    state, _ = after(at(m.Attached(NOW + 300)), m.SnapshotCame(1, 40, 0), m.Signalled(m.TERM))
    state, actions = after(state, m.WorkerDetached(), LOST)
    assert m.KillTree() in actions
    _, actions = after(state, m.TreeGone(), m.Published(1, 40))
    assert ended(actions) == [Exit.INTERRUPTED]


def test_a_rank_that_is_lost_although_it_was_refused() -> None:
    """What starting again would not mend is not tried again."""
    facts = m.WorkerRefused("it is of 3 ranks"), m.WorkerDetached(), LOST, m.TreeGone()
    _, actions = after(at(m.Attached(NOW + 300)), *facts)
    assert ended(actions) == [Exit.GAVE_UP]


def test_why_it_was_killed_is_said() -> None:
    """What is known of a death besides its signal is in the journal and in what is said."""
    state, first = after(at(m.Attached(NOW + 300)), m.Exited(-9, 5, "out of memory"))
    assert first[0] == m.Note("exited", {"code": -9, "step": 5, "cause": "out of memory"})
    assert "signal 9 (SIGKILL) (out of memory) at step 5" in str(after(state, m.TreeGone())[1])


def test_a_refusal_is_given_up_on_at_once() -> None:
    """What starting again would not mend is not tried again: 70 with the worker's own words."""
    facts = m.WorkerRefused("`model` does not fit"), m.Exited(1, 0), m.TreeGone()
    _, actions = after(at(m.Attached(NOW + 300)), *facts)
    assert ended(actions) == [Exit.GAVE_UP]
    assert "`model` does not fit" in str(actions)


def test_exit_0_before_the_resume_point_is_a_failure() -> None:
    """A worker that says that it did not finish is not believed to have finished."""
    state, _ = after(at(m.Attached(NOW)), m.WorkerSaidBye(False), m.Exited(0, 5), m.TreeGone())
    assert isinstance(state.phase, m.Pausing)


def test_fenced() -> None:
    """A newer attempt elsewhere: kill the worker, publish nothing more, 69."""
    state, _ = after(at(m.Attached(NOW + 300)), m.SnapshotCame(1, 40, 1))
    state, actions = after(state, m.PublishFailed(1, "attempt 4 was started", True))
    assert m.KillTree() in actions
    state, actions = after(state, m.SnapshotCame(2, 50, 0), m.TreeGone())
    assert not any(isinstance(action, m.Publish) for action in actions)
    assert ended(actions) == [Exit.LOCKED]


def test_a_full_disk_does_not_stop_training() -> None:
    """A checkpoint that fails is said once and tried again, ever later; so is its end."""
    state, _ = after(at(m.Attached(NOW), durable_step=3), m.Ticked(10))
    now_s, said = NOW, []
    for number, pause_s in enumerate((1, 2, 4, 8, 16, 32, 60, 60), 1):
        failed = m.PublishFailed(number, f"/run/.tmp-{number}: disk full", False)
        came = m.SnapshotCame(number, 10 * number, number + 1)
        state, actions = after(state, came, failed, now_s=now_s)
        said += [action.text for action in actions if isinstance(action, m.Say)]
        assert isinstance(state.phase, m.Attached)
        assert state.phase.flush_s == now_s + pause_s
        now_s += pause_s
        state, asked = m.step(state, m.Ticked(10 * number + 5), now_s)
        assert [type(action) for action in asked] == [m.Request]
    assert len(said) == 1
    assert "step 3 stands" in said[0]
    came = m.SnapshotCame(9, 90, 10)
    state, actions = after(state, came, m.Published(9, 90), now_s=now_s)
    assert m.Say("durable again, at step 90") in actions
    assert isinstance(state.phase, m.Attached)
    assert state.phase.flush_s == now_s + POLICY.every_s


def test_a_full_disk_at_a_start_is_waited_for() -> None:
    """A start that the disk refuses is no failure of the job; the state in memory stays."""
    held = m.Held(7, 70, due=False)
    state, now_s, pauses = at(m.Pausing(NOW), held=held, durable_step=3), NOW, []
    for _ in range(9):
        state, actions = m.step(state, m.Ticked(0), now_s)
        assert m.Spawn(7) in actions
        full = m.SpawnFailed("a failure to start it (No space left on device)", disk=True)
        state, more = after(state, full, m.TreeGone(), now_s=now_s)
        failed = m.PublishFailed(7, "checkpoints/70: disk full", False)
        state, last = after(state, failed, now_s=now_s)
        if isinstance(state.phase, m.Saving):  # the write of the start, then that of the end
            state, last = after(state, failed, now_s=now_s)
        assert isinstance(state.phase, m.Pausing), last
        assert not ended([*actions, *more, *last])
        pauses.append(state.phase.deadline_s - now_s)
        now_s = state.phase.deadline_s
    assert pauses == sorted(pauses)
    assert pauses[-1] == POLICY.backoff_s_max
    assert state.ledger.held is not None
    assert state.failures == 0


def test_a_stop_while_a_failure_is_cleared_away() -> None:
    """No relaunch after a stop, whenever it came."""
    for phase in (m.Ending(NOW + 10, FAILED), m.Saving(math.inf, FAILED)):
        state, _ = after(at(phase, writing=m.Held(1, 10, due=True)), m.Signalled(m.TERM))
        _, actions = after(state, m.TreeGone(), m.Published(1, 10))
        assert ended(actions) == [Exit.INTERRUPTED]
    assert ended(after(at(m.Pausing(NOW + 9)), m.StopAsked())[1]) == [Exit.INTERRUPTED]


def test_never_beside_a_process_that_cannot_be_killed() -> None:
    """A tree that outlives SIGKILL is not relaunched beside."""
    _, actions = after(at(m.Ending(NOW, FAILED)), m.Ticked(0))
    assert ended(actions) == [Exit.GAVE_UP]


# ------------------------------------------------------------------ commands that never attach


@pytest.mark.parametrize(
    ("flush_signal", "code", "expected"),
    [(None, -15, 143), (None, 7, 7), (10, -15, 75), (10, 0, 75)],
)
def test_a_command_of_its_own(flush_signal: int | None, code: int, expected: int) -> None:
    """It is sent the signal (or its own one), and its own end is passed on."""
    policy = Policy(flush_signal=flush_signal)
    state = replace(
        m.begin(policy, NOW, durable_step=None, ever_attached=False), phase=m.Unattached()
    )
    state, actions = after(state, m.Signalled(m.TERM))
    assert m.PassSignal(flush_signal or m.TERM) in actions
    _, actions = after(state, m.Exited(code, 0), m.TreeGone())
    assert ended(actions) == [expected]


def test_attaching_after_the_stop_was_asked() -> None:
    """A worker that attaches late is asked to leave, within the same deadline."""
    state, _ = after(at(m.Unattached()), m.Signalled(m.TERM))
    state, actions = after(state, m.WorkerAttached(), now_s=NOW + 20)
    assert m.Request(2, leave=True) in actions
    assert m.deadline(state) == NOW + 30


def test_a_command_that_cannot_be_started() -> None:
    """It failed as any other attempt: tried again with a pause, then given up on."""
    state = at(m.Unattached())
    for _ in range(POLICY.restarts_max):
        state, actions = after(state, m.SpawnFailed("no memory"), m.TreeGone())
        assert not ended(actions)
        state = restart(state)
    _, actions = after(state, m.SpawnFailed("no memory"), m.TreeGone())
    assert ended(actions) == [Exit.GAVE_UP]


# ------------------------------------------------------------------ a suspected checkpoint


def crashed(state: m.State, step: int, code: int = -11) -> tuple[m.State, list[m.Action]]:
    """The state when the job has crashed and everything was cleared away, and what was ordered."""
    facts = (m.Ticked(0), m.Spawned(), m.WorkerAttached(), m.Exited(code, step), m.TreeGone())
    return after(state, *facts, now_s=(m.deadline(state) or NOW) + 1)


def test_a_checkpoint_that_crashes_again_and_again_is_suspected() -> None:
    """The same crash at the same step: the checkpoint before it is tried once, then no more."""
    state, spawns, actions = at(m.Pausing(NOW), durable_step=40, checkpoints=2), [], []
    for _ in range(5):
        if ended(actions):
            break
        state, actions = crashed(state, 50)
        spawns += [action for action in actions if isinstance(action, m.Spawn)]
    assert spawns == [m.Spawn()] * 3 + [m.Spawn(older=True)]
    assert ended(actions) == [Exit.GAVE_UP]


@pytest.mark.parametrize("why", ["another step", "another crash", "the only checkpoint"])
def test_a_checkpoint_is_not_suspected_without_reason(why: str) -> None:
    """Crashes that differ are the script's, and where there is no older one, none is tried."""
    state = at(m.Pausing(NOW), durable_step=40, checkpoints=1 if why.startswith("the only") else 2)
    for number in range(3):
        step = 50 - number if why == "another step" else 50
        code = -number if why == "another crash" else -11
        state, actions = crashed(state, step, code or -11)
        assert m.Spawn(older=True) not in actions
    assert ended(actions) == [Exit.GAVE_UP]


def test_progress_clears_the_suspicion() -> None:
    """What went on from the older one is a job like any other; it may be tried again later."""
    state = at(m.Pausing(NOW), durable_step=40, checkpoints=2)
    for _ in range(3):
        state, _ = crashed(state, 50)
    assert state.doubted
    state, actions = crashed(state, 60)
    assert not ended(actions)
    assert not state.doubted
    assert state.failures == 1


# ------------------------------------------------------------------ snapshots into memory


def test_snapshots_are_taken_as_often_as_their_cost_allows() -> None:
    """Each costs 1 % of the time until the next one, and none is written by itself."""
    now_s, taken = NOW, []
    state, _ = after(at(m.Unattached()), m.WorkerAttached(), m.Sized(1 << 20))
    for number in range(1, 6):
        now_s = m.deadline(state) or 0.0
        state, actions = after(state, m.Ticked(10 * number), now_s=now_s)
        assert actions == [m.Request(1 + number, leave=False)]
        assert m.deadline(state) == NOW + 300, "asked once"
        came = m.SnapshotCame(number, 10 * number, 1 + number, cost_s=0.25)
        state, actions = after(state, came, now_s=now_s)
        assert actions == ([m.Forget(number - 1)] if number > 1 else [])
        taken.append(now_s)
    assert [b - a for a, b in itertools.pairwise(taken)] == [25.0] * 4


def test_the_first_snapshot_is_taken_when_its_share_has_been_earned() -> None:
    """A GiB of new memory takes about a second to fill: not in the first seconds of a job."""
    state, _ = after(at(m.Unattached()), m.WorkerAttached(), m.Sized(10**9))
    assert m.deadline(state) == NOW + 100


def test_no_snapshot_into_memory_where_none_is_wanted() -> None:
    """`--overhead 0`, `--memory-tier off`, no memory left, nothing new, or a write under way."""
    policy = Policy(every_s=300.0, overhead=0.0)
    state, _ = after(replace(at(m.Unattached()), policy=policy), m.WorkerAttached(), m.Sized(1))
    state, _ = after(state, m.SnapshotCame(1, 5, 0, 0.1))
    assert m.deadline(state) == NOW + 300
    held = m.Held(1, 10, due=False)
    due = at(m.Attached(NOW + 300, NOW), held=held)
    assert after(due, m.Ticked(11))[1] == [m.Request(2, leave=False)]
    assert after(due, m.Ticked(10))[1] == [], "nothing new"
    assert after(due, m.MemoryShort(), m.Ticked(11))[1] == []
    assert after(replace(due, keeps=False), m.Ticked(11))[1] == []
    newer = m.Held(2, 11, due=False)
    both = at(m.Attached(NOW + 300, NOW), writing=held, held=newer)
    assert after(both, m.Ticked(12))[1] == []


def test_a_checkpoint_is_written_though_memory_was_asked_for_meanwhile() -> None:
    """The word on the page holds one request: the answer to a later one serves an earlier one."""
    state, _ = after(at(m.Attached(NOW, NOW)), m.Ticked(11))
    assert state.wanted == 2
    state, actions = after(state, m.SnapshotCame(1, 11, 3, 0.1))
    assert actions == [m.Publish(1)]
    state, actions = after(state, m.SnapshotCame(2, 12, 4, 0.1))
    assert m.Publish(2) not in actions
    assert state.wanted == 0
    _, actions = after(state, m.Published(1, 11), m.Stood(2, 5))
    assert not any(isinstance(action, m.Publish) for action in actions)


# ------------------------------------------------------------------ what is said


def test_what_an_interruption_would_cost() -> None:
    """One line for a person; a flush that does not fit into the grace is not called free."""
    stake = {"flush_s": 0.75, "step_s": 0.05, "crash_s": 12.0, "power_s": 240.0}
    assert at_stake(30.0, **stake) == (
        "SIGTERM: 0 steps; crash: ≤ 12 s; power cut: ≤ 4 min; a flush needs 0.8 s, the grace is "
        "30 s"
    )
    assert at_stake(0.5, **stake).startswith("SIGTERM: ≤ 12 s; crash")
    said = at_stake(30.0, flush_s=None, step_s=None, crash_s=8000.0, power_s=8000.0)
    assert said == "SIGTERM: 0 steps; crash: ≤ 2.2 h; power cut: ≤ 2.2 h"
    assert at_stake(30.0, **stake, refused=True).startswith("SIGTERM: ≤ 4 min, unless the disk")


def test_space_is_counted_for_all_checkpoints() -> None:
    """`keep` and the one that is written, less those that are there; and what would fit."""
    assert space_short(100, 3, 0, 400) is None
    assert space_short(100, 3, 3, 100) is None
    assert "--keep 2" in str(space_short(100, 3, 0, 399))
    assert "--keep 1" in str(space_short(100, 3, 1, 199))
    assert "another --dir" in str(space_short(100, 3, 0, 99))
    assert "another --dir" in str(space_short(100, 3, 3, 99)), "there is no room for the next one"
