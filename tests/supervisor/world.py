"""A simulated world around the state machine: a clock, a command, a disk and impatient users.

The world carries out the machine's orders and tells it facts, at simulated times and in any order
in which they could really happen; a seed decides. After each order it checks what was promised, and
raises AssertionError, with the seed, where a promise is broken.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptd.supervisor import machine as m
from ckptd.supervisor.policy import WRITE_S_MAX, Exit, Policy

TURNS_MAX = 20_000
SLACK_S = 1.0
CODES = {*map(int, Exit), *(128 + n for n in (m.HUP, m.INT, m.KILL, m.USR1, 11, m.TERM)), 1, 3}
PATIENCE_S = 1000.0


@dataclass
class Child:
    """A running command; `tree` stays true after its exit until everything of it was killed."""

    attaches: bool
    alive: bool = True
    tree: bool = True
    killed: bool = False
    attached: bool = False
    step: int = 0
    generation: int = 0
    answered: int = 0
    leaving: bool = False
    asked: tuple[int, bool] | None = None
    awaiting: int | None = None


@dataclass(order=True)
class Event:
    at_s: float
    number: int
    happen: Callable[[], None] = field(compare=False)


class World:
    """One simulated life of a job; `run` plays it to its end and checks it all along."""

    def __init__(self, seed: int, *, stop_before: int | None = None, stop: int = m.TERM) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.policy = Policy(
            every_s=self.dice.choice([2.0, 20.0, 1e6]),
            grace_s=self.dice.choice([1.0, 5.0, 30.0]),
            grace_given=self.dice.random() < 0.5,
            restarts_max=self.dice.choice([0, 1, 3]),
            memory_tier=self.dice.random() < 0.8,
            overhead=self.dice.choice([0.0, 0.01, 0.1]),
        )
        self.now_s = 0.0
        self.numbers = itertools.count()
        self.events: list[Event] = []
        self.child: Child | None = None
        self.held: dict[int, int] = {}  # generation -> step, of what the loop keeps in memory
        self.generation = 0
        self.published: dict[int, int] = {}  # generation -> step
        self.lost = -1  # the newest step that was let go of without being durable
        self.writing: int | None = None
        self.durable = -1  # the newest step that is really on the disk
        self.promised = -1  # the newest step that anybody was told is
        self.code: int | None = None
        self.asked_s: float | None = None
        self.finish_at = self.dice.randint(1, 40)
        self.lives_at = 0  # where a new attempt starts
        self.facts = 0
        self.stop_before, self.stop = stop_before, stop
        ever = self.dice.random() < 0.5
        self.state = m.begin(self.policy, 0.0, durable_step=None, ever_attached=ever)
        # A worker that hangs without anybody noticing: in the end a person has enough of it.
        self.later(PATIENCE_S, lambda: self.send_stop(m.StopAsked()))
        if stop_before is None:
            for _ in range(self.dice.choice([0, 0, 1, 2, 5])):
                self.later(self.dice.uniform(0, 60), self.user)

    # -------------------------------------------------------------- playing

    def run(self) -> World:
        try:
            for _ in range(TURNS_MAX):
                if self.code is not None:
                    self.check_end()
                    return self
                self.turn()
            raise AssertionError("it does not end")
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}, at {self.now_s:.2f} s: {error}") from error

    def turn(self) -> None:
        due_s = m.deadline(self.state)
        nothing = not self.events and due_s is None
        assert not nothing, f"nothing will ever happen in {self.state.phase}"
        if self.events and (due_s is None or self.events[0].at_s <= due_s):
            event = heapq.heappop(self.events)
            self.now_s = max(self.now_s, event.at_s)
            event.happen()
        else:
            assert due_s is not None
            self.now_s = max(self.now_s, due_s)
            before = self.state
            self.tell(m.Ticked(self.step()))
            assert self.state != before, f"a due tick changed nothing in {before.phase}"

    def later(self, delay_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self.events, Event(self.now_s + delay_s, next(self.numbers), happen))

    def soon(self, happen: Callable[[], None], most_s: float = 0.5) -> None:
        self.later(self.dice.uniform(0, most_s), happen)

    def tell(self, fact: m.Fact) -> None:
        if self.code is not None:
            return
        self.facts += 1
        if self.stop_before == self.facts:
            self.send_stop(m.Signalled(self.stop))
            if self.code is not None:
                return
        self.state, actions = m.step(self.state, fact, self.now_s)
        for action in actions:
            self.carry_out(action)

    def send_stop(self, fact: m.Fact) -> None:
        if self.asked_s is None:
            self.asked_s = self.now_s
        self.state, actions = m.step(self.state, fact, self.now_s)
        for action in actions:
            self.carry_out(action)

    def user(self) -> None:
        fact = self.dice.choice(
            [m.Signalled(n) for n in (m.TERM, m.INT, m.USR1, m.HUP, m.USR2, m.USR2)]
            + [m.StopAsked(), m.CheckpointAsked()]
        )
        is_stop = isinstance(fact, m.StopAsked) or (
            isinstance(fact, m.Signalled) and fact.number != m.USR2
        )
        if self.code is None:
            self.send_stop(fact) if is_stop else self.tell(fact)

    # -------------------------------------------------------------- orders

    def carry_out(self, action: m.Action) -> None:
        assert self.code is None, f"{action} after the end"
        match action:
            case m.Spawn(memory, older):
                self.spawn(memory, older)
            case m.Request(serial, leave):
                assert self.child is not None, "a request to nobody"
                assert self.child.attached, "a request to nobody"
                assert self.child.asked is None or serial > self.child.asked[0], "a serial again"
                self.child.asked = serial, leave
            case m.PassSignal(number):
                self.signal_child(number)
            case m.Publish(generation):
                assert self.writing is None, "two writes at once"
                assert generation in self.held, "a write of what is not in memory"
                self.writing = generation
                self.soon(self.write_ends, self.dice.choice([0.1, 2.0, 100.0, 900.0]))
            case m.Forget(generation):
                assert generation in self.held, "forgotten twice"
                assert generation != self.writing, "forgotten while it is written"
                step = self.held.pop(generation)
                if step > max(self.durable, *self.held.values(), -1):
                    self.lost = max(self.lost, step)
            case m.Receipt(generation, why):
                self.receipt(generation, why)
            case m.Inspect():
                assert self.child is not None, "nobody to look at"
                if self.dice.random() < 0.8:
                    self.soon(self.inspected, 30.0)
            case m.KillTree():
                if self.child is not None:
                    self.child.alive, self.child.killed = False, True
                    self.soon(self.tree_ends)
            case m.End(code):
                self.code = code

    def spawn(self, memory: int | None, older: bool) -> None:
        assert self.child is None or not self.child.tree, "two commands at once"
        self.lives_at = max(self.durable, 0)
        if memory is not None:
            assert memory in self.held, "restored from what was let go of"
            self.lives_at = self.held[memory]
        newest = max(self.durable, *self.held.values(), 0)
        assert self.lost <= newest, f"step {self.lost} was let go of, {newest} is the newest"
        if older:
            assert newest == self.durable, "a state in memory is newer than what is doubted"
            newest = self.lives_at = sorted(self.published.values())[-2]
        assert self.lives_at == newest, f"{newest} is there, restored is {self.lives_at}"
        self.child = child = Child(attaches=self.dice.random() < 0.85, step=self.lives_at)
        if self.dice.random() < 0.03:
            child.alive = child.tree = False
            self.child = None
            self.tell(m.SpawnFailed("no memory"))
            self.soon(self.nothing_left)
            return
        self.tell(m.Spawned())
        self.soon(lambda: self.attach(child) if child.attaches else self.live(child), 3.0)

    def nothing_left(self) -> None:
        if self.child is None and isinstance(self.state.phase, m.Ending):
            self.tell(m.TreeGone())

    def signal_child(self, number: int) -> None:
        child = self.child
        if child is not None and child.alive and self.dice.random() < 0.8:
            self.soon(lambda: self.exits(child, self.dice.choice([-number, 0, 3])))

    def receipt(self, generation: int, why: str | None) -> None:
        if why is None:
            assert generation in self.published, "a receipt for what is not durable"
            assert self.state.ledger.durable_step is not None, "a receipt, and nothing is durable"
            assert self.durable >= self.state.ledger.durable_step, "a receipt ahead of the disk"
            self.promised = max(self.promised, self.published[generation])
        child = self.child
        if child is not None and child.alive and child.leaving and generation == child.awaiting:
            code = 75 if why is None else 74
            if self.dice.random() < 0.9:  # else it hangs while it ends
                self.soon(lambda: self.exits(child, code))

    # -------------------------------------------------------------- what happens by itself

    def attach(self, child: Child) -> None:
        if child.alive:
            child.attached = True
            self.tell(m.WorkerAttached())
            self.tell(m.Sized(self.dice.choice([1, 10**9])))
            self.soon(lambda: self.live(child))

    def live(self, child: Child) -> None:
        """One step of the command, or one of the things that can befall it."""
        if not child.alive or child.leaving or self.code is not None:
            return
        luck = self.dice.random()
        if luck < 0.03:
            self.exits(child, self.dice.choice([-9, -11, 1, 3]))
            return
        if luck < 0.04:
            if self.dice.random() < 0.5:
                self.soon(lambda: self.stalls(child), 30.0)
            return  # it hangs, noticed or not
        if luck < 0.06 and child.attached:
            self.tell(m.MemoryShort())
            assert self.state.ledger.held is None or not self.state.ledger.held.durable
        child.step += 1
        if child.step >= self.finish_at:
            self.exits(child, 0)
            return
        if child.attached:
            self.safe_point(child)
        if child.alive and not child.leaving:
            self.soon(lambda: self.live(child), 2.0)

    def stalls(self, child: Child) -> None:
        if child is self.child and child.alive and child.attached:
            self.tell(m.Stalled(10.0, child.step))

    def inspected(self) -> None:
        if self.child is not None:
            self.tell(m.Inspected())

    def safe_point(self, child: Child) -> None:
        if child.asked is not None and child.asked[0] > child.answered:
            serial, leave = child.asked
            child.answered = serial
            child.leaving = leave
            if child.generation and self.dice.random() < 0.2:
                child.awaiting = child.generation
                self.tell(m.Stood(child.generation, serial))
            else:
                self.snapshot(child, serial)
        elif self.dice.random() < 0.2:
            self.snapshot(child, 0)

    def snapshot(self, child: Child, asked: int) -> None:
        self.generation = child.generation = self.generation + 1
        child.awaiting = child.generation
        self.held[child.generation] = child.step
        cost_s = self.dice.choice([0.1, 0.5])
        self.tell(m.SnapshotCame(child.generation, child.step, asked, cost_s))

    def exits(self, child: Child, code: int) -> None:
        if child.alive:
            child.alive = False
            if child.attached and self.dice.random() < 0.5:
                self.tell(m.WorkerDetached())
            self.tell(m.Exited(code, child.step))

    def tree_ends(self) -> None:
        child = self.child
        if child is not None and child.tree and not child.alive:
            child.tree = False
            if self.dice.random() < 0.97 and isinstance(self.state.phase, m.Ending):
                self.tell(m.TreeGone())
            elif isinstance(self.state.phase, m.Ending):
                child.tree = True  # it sits in the kernel, for ever

    def write_ends(self) -> None:
        generation, self.writing = self.writing, None
        assert generation is not None
        luck = self.dice.random()
        if luck < 0.85:
            step = self.held[generation]
            self.durable = max(self.durable, step)
            self.published[generation] = step
            self.tell(m.Published(generation, step, self.dice.choice([0.1, 2.0])))
        else:
            self.tell(m.PublishFailed(generation, "disk full", luck > 0.98))

    def step(self) -> int:
        return 0 if self.child is None else self.child.step

    # -------------------------------------------------------------- promises at the end

    def check_end(self) -> None:
        assert self.code in CODES, f"exit code {self.code}"
        assert self.promised <= self.durable, "what was called durable is not there"
        if self.child is not None and self.child.tree:
            assert self.child.killed, "it ended beside processes that nobody tried to kill"
        if self.asked_s is not None:
            write_s = self.policy.grace_s if self.policy.grace_given else WRITE_S_MAX
            # To a safe point, for its write, and for what is written after a kill.
            bound_s = self.policy.grace_s + 2 * write_s + self.policy.kill_s + SLACK_S
            took_s = self.now_s - self.asked_s
            assert took_s <= bound_s, f"it took {took_s:.1f} s to stop, at most {bound_s} s allowed"
        if self.code == Exit.INTERRUPTED and self.held and self.writing is None:
            raise AssertionError("75 with a state in memory that is not durable")
        if self.code == Exit.INTERRUPTED:
            assert self.lost <= self.durable, f"75, and step {self.lost} was let go of"
        leaked = set(self.held) - {self.writing}
        assert not leaked, f"snapshots {leaked} were never let go of"
