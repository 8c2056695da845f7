"""Bugs that were planted into the machine on purpose are caught: the checks can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_machine as explicit
from world import World

from ckptd.supervisor import machine as m
from ckptd.supervisor import policy

SEEDS = 3000


def worlds() -> None:
    for seed in range(SEEDS):
        World(seed).run()


def without(kind: type, function: Callable[..., m.Turn]) -> Callable[..., m.Turn]:
    """The same, less one kind of action."""

    def planted(*args: Any, **options: Any) -> m.Turn:
        state, actions = function(*args, **options)
        return state, [action for action in actions if not isinstance(action, kind)]

    return planted


def relaunched_beside_the_old_tree(state: m.State, purpose: m.Purpose, now_s: float) -> m.Turn:
    return m._after_tree(state, purpose, now_s)


def receipt_before_it_is_durable(state: m.State, fact: m.SnapshotCame) -> m.Turn:
    state, actions = ORIGINAL["_hold"](state, fact)
    return state, [*actions, m.Receipt(fact.generation, None)]


def written_while_another_is(state: m.State) -> m.Turn:
    held = state.ledger.held
    if held is None or not held.due:
        return state, []
    return m._with(state, writing=held, held=None), [m.Publish(held.generation)]


def memory_dropped_at_a_death(state: m.State, purpose: m.Purpose, now_s: float) -> m.Turn:
    return ORIGINAL["_after_tree"](m._with(state, held=None), purpose, now_s)


def memory_dropped_before_a_start(state: m.State, *args: Any) -> m.Turn:
    held = state.ledger.held
    state, actions = ORIGINAL["_pause"](m._with(state, held=None), *args)
    return state, actions if held is None else [m.Forget(held.generation), *actions]


def started_from_an_older_state(state: m.State, *args: Any) -> m.Turn:
    state, actions = ORIGINAL["_start"](state, *args)
    return state, [m.Spawn(None) if isinstance(one, m.Spawn) else one for one in actions]


def kept_though_memory_is_short(state: m.State, *_: Any) -> m.Turn:
    return state, []


def no_deadline_for_a_flush(state: m.State) -> float | None:
    return None if isinstance(state.phase, m.Flushing) else ORIGINAL["deadline"](state)


def stop_forgotten_when_the_worker_dies(*args: Any) -> m.Turn:
    state, _, fact, now_s = args
    return m._died(state, fact, now_s)


def durable_step_taken_back(state: m.State, fact: m.Published) -> m.Turn:
    state, actions = ORIGINAL["_book"](state, fact)
    return m._with(state, durable_step=None), actions


def success_without_durability(state: m.State, purpose: m.Purpose, now_s: float) -> m.Turn:
    return ORIGINAL["_conclude"](m._with(state, failed=None), purpose, now_s)


def term_kills_at_once(*args: Any) -> m.Turn:
    state, phase, _, now_s = args
    return m._end_tree(state, m.Purpose(m.Why.STOPPED, phase.stop), now_s)


def endless_grace(state: m.State, *args: Any, **options: Any) -> m.Turn:
    state, actions = ORIGINAL["_ask_to_leave"](state, *args, **options)
    return replace(state, phase=replace(state.phase, deadline_s=1e9)), actions


ORIGINAL = {
    name: getattr(m, name)
    for name in (
        *("_hold", "_after_tree", "deadline", "_book", "_conclude", "_ask_to_leave"),
        *("_pause", "_start"),
    )
}
FLUSHING_EXITED, FLUSHING_SIGNALLED = (m.Flushing, m.Exited), (m.Flushing, m.Signalled)

#: name -> (what is replaced: a function of the machine or an answer; by what; what must notice).
PLANTED: dict[str, tuple[Any, Any, Callable[[], None]]] = {
    "relaunched beside the old tree": ("_end_tree", relaunched_beside_the_old_tree, worlds),
    "receipt before it is durable": ("_hold", receipt_before_it_is_durable, worlds),
    "written while another is": ("_publish_due", written_while_another_is, worlds),
    "memory dropped at a death": ("_after_tree", memory_dropped_at_a_death, worlds),
    "memory never let go of": ("_book", without(m.Forget, m._book), worlds),
    "memory dropped before a start": ("_pause", memory_dropped_before_a_start, worlds),
    "started from an older state": ((m.Pausing, m.Ticked), started_from_an_older_state, worlds),
    "kept though memory is short": (
        (m.Attached, m.MemoryShort),
        kept_though_memory_is_short,
        worlds,
    ),
    "no deadline for a flush": ("deadline", no_deadline_for_a_flush, worlds),
    "endless grace": ("_ask_to_leave", endless_grace, worlds),
    "tree not killed": ("_end_tree", without(m.KillTree, m._end_tree), worlds),
    "durable step taken back": ("_book", durable_step_taken_back, worlds),
    "stop forgotten when the worker dies": (
        FLUSHING_EXITED,
        stop_forgotten_when_the_worker_dies,
        worlds,
    ),
    "a second TERM kills": (
        FLUSHING_SIGNALLED,
        term_kills_at_once,
        explicit.test_a_second_term_is_not_force,
    ),
    "75 though nothing is durable": (
        "_conclude",
        success_without_durability,
        explicit.test_what_cannot_be_made_durable_at_a_stop,
    ),
    "a write that is begun when it is too late": (
        "_waits_until_s",
        lambda _, phase: phase.deadline_s,
        explicit.test_a_write_is_begun_in_time_for_the_deadline,
    ),
    "a hang that is killed before anybody looked": (
        (m.Attached, m.Stalled),
        lambda state, _, fact, now_s: m._end_tree(state, m.Purpose(m.Why.FAILED, "a hang"), now_s),
        explicit.test_a_hang,
    ),
    "hangs never counted": ("_count_failure", lambda state, *_: state, explicit.test_a_hang),
    "a hang that is looked into for ever": (
        (m.Inspecting, m.Ticked),
        lambda state, *_: (state, []),
        worlds,
    ),
    "failures never counted": (
        "failures_in_a_row",
        lambda *_: 1,
        explicit.test_restarts_back_off_and_give_up,
    ),
    "progress never counted": (
        "failures_in_a_row",
        lambda before, *_: before + 1,
        explicit.test_progress_starts_the_count_anew,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this bug in it, a check fails; without it, the same check passes."""
    target, planted, notices = PLANTED[name]
    if isinstance(target, tuple):
        monkeypatch.setitem(m._ANSWERS, target, planted)
    else:
        monkeypatch.setattr(policy if hasattr(policy, target) else m, target, planted)
    with pytest.raises((AssertionError, IndexError)):
        notices()
    monkeypatch.undo()
    notices()
