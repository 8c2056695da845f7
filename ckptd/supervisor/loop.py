"""The loop: tells the machine facts and carries out its actions.

Rules:

1. Nothing is decided here. What happens to the job is the machine's; the loop knows processes,
   sockets and files, and in which order to touch them.
2. It sleeps until a descriptor is readable or the machine's deadline comes, whichever is first.
3. The command's output passes through: into the run's log and on to our standard output, as it
   comes.
4. Whatever ends the loop, the command's tree is dead and the socket is gone when it returns.
"""

from __future__ import annotations

import errno
import math
import os
import selectors
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from ckptd import wire
from ckptd.errors import CkptdError, DamagedError, FencedError, MismatchError, ProtocolError
from ckptd.host import children, clouds, disk, memory, slurm, stacks
from ckptd.host.children import Child, Killer
from ckptd.host.clock import Clock
from ckptd.host.clouds import Cloud, Notice
from ckptd.host.disk import RealDisk
from ckptd.host.host import Host
from ckptd.host.host import Notice as HostNotice
from ckptd.host.memory import OomWatch
from ckptd.host.signals import Signals
from ckptd.store import fence, retention, store
from ckptd.store import manifest as manifests
from ckptd.store.manifest import File
from ckptd.supervisor import machine, server
from ckptd.supervisor.errands import Errands
from ckptd.supervisor.gauge import Facts, Gauge, summary
from ckptd.supervisor.journal import Journal
from ckptd.supervisor.policy import (
    SLOW_WRITE_S,
    Exit,
    Policy,
    described,
    sized,
    space_short,
)
from ckptd.supervisor.ranks import Ranks, Worker
from ckptd.supervisor.relay import Relays
from ckptd.supervisor.rhythm import Rhythm
from ckptd.supervisor.run import JobFile, Run, SupervisorFile, boot_id, environment_for
from ckptd.supervisor.scribe import Scribe
from ckptd.supervisor.server import Peer, Server, close_all
from ckptd.supervisor.terminal import Terminal
from ckptd.supervisor.writer import Done, Job, Part, Writer, is_sound

_CHUNK: Final = 1 << 16
_TREE_POLL_S: Final = 0.02
_FENCE_S: Final = 5.0  # how often it is looked whether a newer copy runs elsewhere
_GLANCE_S: Final = 1.0  # how often the terminal's line and the rate are brought up to date
_MORE_TIME_S: Final = 30.0  # asked for anew at each glance
_READS_S: Final = 5.0  # reading a checkpoint takes no longer, as a rule
_LAST_LINES: Final = 20
_LOST_S: Final = 10.0  # until a job of which a rank has died is ended, if its launcher does not
_COMES_S: Final = 60.0  # for as long, others may come later than the first rank
_SENT_MAX: Final = 64
#: No fault of the command's: it is tried until the disk is there again.
_DISK_TROUBLE: Final = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOENT, errno.EACCES, errno.EPERM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENOTCONN, errno.EHOSTDOWN),
}


@dataclass
class _Attempt:
    """What belongs to one start of the command."""

    number: int
    child: Child
    output: int  # read end of its output pipe
    ranks: Ranks  # its workers
    checkpoint: Path | None
    memory: Job | None  # the state to restore; before the checkpoint
    oom: OomWatch
    ready: bool = False  # it is known what it restores: its workers may be welcomed
    from_step: int = 0
    of_ranks: int | None = None  # of how many ranks is what it restores
    came_s: float = math.inf  # when the first worker attached
    lost_s: float = math.inf  # when the first of several ranks ended before its time


class Loop:
    """Supervises one run from the first start to an exit code.

    Args:
        run: its directory, with job.json written.
        policy: what the user set.
        lock: the descriptor of the run's lock.
        clock: the time.
        terminal: where the user is told things.
        host: what started us.
        signals: those that came so far, and that will come; closed at the end.
        cloud: what may take the machine away; None: nobody.
        listen: the name of this machine under which ranks on others find it, and the port (0: any);
            None: there are none.
    """

    def __init__(
        self,
        run: Run,
        policy: Policy,
        lock: int,
        clock: Clock,
        terminal: Terminal,
        host: Host,
        signals: Signals,
        cloud: Cloud | None = None,
        listen: tuple[str, int] | None = None,
    ) -> None:
        job = run.job()
        assert job is not None, "written by launch"
        policy = msgspec.structs.replace(policy, comes_back=host.restarts)
        self._run, self._job, self._policy, self._lock = run, job, policy, lock
        self._clock, self._terminal, self._host = clock, terminal, host
        self._cloud = cloud
        self._polled_s = -math.inf
        self._advised = False  # to save, and nobody could be asked yet
        self._notices: list[int] = []  # signals that workers passed on, not told of yet
        self._noted: SupervisorFile | None = None
        self._fence_looked_s = clock.now_s()
        self._disk = RealDisk()
        journal = Journal(run.journal, clock.wall_s, terminal.say)
        self._scribe = Scribe(journal, run.log, terminal.say_once)
        self._selector = selectors.DefaultSelector()
        self._signals = signals
        self._server = Server()
        self._relays = self._listening(listen)
        self._errands = Errands(terminal.say_once)
        self._killer = Killer()
        self._attempt: _Attempt | None = None
        self._number = 0
        self._writer = Writer(
            self._disk, run.path, lambda: self._number, policy.keep, clock.wall_s, terminal.say
        )
        self._held: dict[int, Job] = {}
        self._sent: dict[int, dict[int, int]] = {}  # the newest states: each rank's own number
        self._sums: dict[int, Mapping[str, File]] = {}  # of those that are durable
        self._waiting: list[tuple[Peer, wire.Hello]] = []  # until it is known what to restore
        self._distrusted: dict[Path, str] = {}  # checkpoints that a worker could not read, and why
        self._generation = 0  # the last one that came
        self._askers: list[Peer] = []
        self._stop_askers: list[Peer] = []
        #: Whether the owner asked for the stop, who starts the job again when it is wanted.
        self.stopped_by_owner = False
        self._code: int | None = None
        self._last_lines: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._unended = b""  # the begin of a line whose rest has not come yet
        self._rhythm = Rhythm(policy.hang_after_s)
        self._read_once = False
        # By their names; what they hold is read while the command starts.
        names = self._checkpoints()
        order = retention.order_of(names[0]) if names else None
        self._state = machine.begin(
            policy,
            clock.now_s(),
            durable_step=None if order is None else order[0],
            ever_attached=job.facts is not None,
            checkpoints=len(names),
        )
        self._began_at = self._state.ledger.durable_step
        self._gauge = Gauge(policy, clock.now_s(), continued=self._began_at is not None)

    def _listening(self, listen: tuple[str, int] | None) -> Relays | None:
        if listen is None:
            return None
        host, port = listen
        say = self._terminal.say_once
        return Relays(host, port, self._server.address, self._run.path, say)

    @property
    def progressed(self) -> bool:
        """Whether a new step became durable."""
        durable = self._state.ledger.durable_step
        return durable is not None and (self._began_at is None or durable > self._began_at)

    def run(self) -> int:
        """Supervise until the end; the exit code of `ckptd launch`."""
        children.become_subreaper()
        self._watch(self._signals, self._signals_came)
        self._watch(self._server, self._somebody_connected)
        self._watch(self._writer, self._write_ended)
        self._watch(self._errands, self._errands.deliver)
        killed = self._run.supervisor()
        if killed is not None and killed.alive() is False:
            server.remove_left_behind(killed.socket)
        self._note_supervisor()
        try:
            while self._code is None:
                self._turn()
            return self._code
        finally:
            self._close()

    # -------------------------------------------------------------- one turn

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._sleep_s()):
            # One that was readable may be gone by now: the command's end takes its worker along.
            if key in self._selector.get_map().values():
                key.data()
        if self._code is not None:
            return
        now_s = self._clock.now_s()
        if isinstance(self._state.phase, machine.Ending):
            if self._is_gone():
                if self._attempt is not None:
                    self._hear_worker_out(self._attempt)
                self._end_attempt()
                self._tell(machine.TreeGone())
            else:
                self._kill()  # what was forked while the others were killed
        due_s = machine.deadline(self._state)
        if due_s is not None and now_s >= due_s:
            self._tell(machine.Ticked(self._step()))
        if self._attempt is not None:
            self._attempt.ranks.look(now_s)
        self._glance(now_s)
        self._poll_cloud(now_s)
        self._look_at_fence(now_s)

    def _poll_cloud(self, now_s: float) -> None:
        if self._cloud is not None and now_s - self._polled_s >= clouds.POLL_S:
            self._polled_s = now_s
            self._errands.ask("cloud", self._cloud.poll, self._cloud_noticed)

    def _cloud_noticed(self, notice: Notice | None) -> None:
        if notice is None:
            return
        self._scribe.event("notice", text=notice.text, left_s=notice.left_s)
        self._terminal.say(notice.text)
        if notice.left_s is None:
            self._advised = True
            self._act_on_advice()
        else:
            self._tell(machine.StopAsked(notice.text))
            self._tell(machine.HostLimited(notice.left_s))

    def _act_on_advice(self) -> None:
        """Save, and go on as long as it lasts; as soon as there is somebody to ask."""
        attached = self._attempt is not None and self._attempt.ranks.attached()
        if self._advised and (attached or self._policy.flush_signal is not None):
            self._advised = False
            self._tell(machine.Signalled(machine.USR2))

    def _look_at_fence(self, now_s: float) -> None:
        """Notice now and then, and not only at the next write, that a newer copy runs elsewhere."""
        if self._attempt is None or now_s - self._fence_looked_s < _FENCE_S:
            return
        self._fence_looked_s = now_s
        number = self._number

        def newer() -> str | OSError | None:
            try:
                fence.check(self._disk, self._run.path, number)
            except FencedError as error:
                return str(error)
            except OSError as error:
                return error
            return None

        self._errands.ask("fence", newer, self._fence_seen)

    def _fence_seen(self, found: str | OSError | None) -> None:
        if isinstance(found, OSError):
            self._terminal.say_once(f"{self._run.path / 'attempts'} can't be read: {found}")
        elif found is not None:
            self._tell(machine.Superseded(found))

    def _sleep_s(self) -> float | None:
        due_s = machine.deadline(self._state)
        asks_s = math.inf if self._attempt is None else self._attempt.ranks.due_s()
        if not math.isinf(asks_s):
            due_s = asks_s if due_s is None else min(due_s, asks_s)
        sleep_s = None if due_s is None else max(0.0, due_s - self._clock.now_s())
        if isinstance(self._state.phase, machine.Ending):
            return min(_TREE_POLL_S, sleep_s or 0.0)
        return _GLANCE_S if sleep_s is None else min(sleep_s, _GLANCE_S)

    def _tell(self, fact: machine.Fact) -> None:
        self._state, actions = machine.step(self._state, fact, self._clock.now_s())
        noted = [one.fields.get("text") for one in actions if isinstance(one, machine.Note)]
        for action in actions:
            if isinstance(action, machine.Say) and action.text not in noted:
                self._scribe.event("told", text=action.text)  # why it does what it does
            self._do(action)

    def _watch(self, source: Any, react: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, react)

    # -------------------------------------------------------------- actions

    def _do(self, action: machine.Action) -> None:  # one line an action
        attempt = self._attempt
        match action:
            case machine.Spawn(memory, older):
                self._spawn(None if memory is None else self._held[memory], older=older)
            case machine.Request(serial, leave):
                assert attempt is not None, "a worker is attached"
                attempt.ranks.ask(serial, self._clock.now_s(), leave=leave)
            case machine.PassSignal(number):
                if attempt is not None:
                    attempt.child.signal(number)
            case machine.Publish(generation):
                self._gauge.write_began(self._clock.now_s())
                self._writer.publish(self._held[generation])
            case machine.Forget(generation):
                self._release(generation)
            case machine.Receipt(generation, why):
                self._receipt(generation, why)
            case machine.Answer(ok, text):
                for peer in self._askers:
                    peer.send(wire.Answer(ok, text, {}))
                self._askers.clear()
            case machine.Inspect():
                self._errands.ask("stacks", self._inspect, self._inspected)
            case machine.KillTree():
                if attempt is not None and attempt.child.exit_code() is None:
                    self._scribe.event("killed", step=self._step())
                self._kill()
            case machine.Note(event, fields):
                self._scribe.event(event, **fields)
            case machine.Say(text):
                self._terminal.say(text)
            case machine.End(code):
                self._end(code)

    def _inspect(self) -> None:
        stacks.show(lambda lines: self._scribe.output(lines.encode(errors="replace")))

    def _inspected(self, _: None) -> None:
        self._terminal.say(f"what the processes were doing: {self._run.log}")
        self._tell(machine.Inspected())

    def _release(self, generation: int) -> None:
        job = self._held.pop(generation, None)
        self._sums.pop(generation, None)
        if job is not None:
            self._let_go(job.parts, job.attempt)

    def _let_go(self, parts: Sequence[Part], number: int) -> None:
        """Of what the ranks of an attempt sent."""
        attempt = self._attempt
        for part in parts:
            os.close(part.descriptor)
            # A later worker counts its snapshots anew, and must not be told of another one's.
            if attempt is not None and attempt.number == number:
                worker = attempt.ranks.worker(part.rank)
                if worker is not None and worker.peer is not None:
                    worker.peer.send_or_drop(wire.Released(part.snapshot.generation))

    def _kill(self) -> None:
        now_s = self._clock.now_s()
        self._killer.kill(now_s)
        for worker in () if self._attempt is None else self._attempt.ranks:
            worker.kill(now_s)

    def _is_gone(self) -> bool:
        attempt = self._attempt
        if attempt is None:
            return children.tree_is_gone(None)
        now_s = self._clock.now_s()
        if not all(worker.is_gone(now_s) for worker in attempt.ranks):
            return False
        return children.tree_is_gone(attempt.child)

    def _spawn(self, snapshot: Job | None, *, older: bool) -> None:
        try:
            self._number = self._run.claim_attempt()
        except (OSError, CkptdError) as error:
            refused = isinstance(error, OSError) and error.errno in _DISK_TROUBLE
            self._tell(machine.SpawnFailed(f"a failure to start it ({error})", refused))
            return
        try:
            attempt = self._start(snapshot)
        except (OSError, CkptdError) as error:
            self._tell(machine.SpawnFailed(f"a failure to start it ({error})"))
            return
        sums = None if snapshot is None else self._sums.get(snapshot.generation)
        if snapshot is None:
            self._look_for_newest(attempt, older=older)
        elif sums is None:
            self._started(attempt, None)
        else:
            self._look_into_memory(attempt, snapshot, sums)

    def _look_into_memory(self, attempt: _Attempt, snapshot: Job, sums: Mapping[str, File]) -> None:
        """Compare a snapshot with what was written of it, while the command starts."""

        def found(sound: bool) -> None:  # noqa: FBT001  # an errand's answer
            if attempt is not self._attempt or attempt.ready:
                return  # it has ended meanwhile
            if sound:
                self._started(attempt, None)
                return
            self._terminal.say(
                f"the state of step {snapshot.step} in memory is not what was written of "
                "it (the process that died may have written into it): the disk is used"
            )
            attempt.memory = None
            self._look_for_newest(attempt, older=False)

        # It may be let go of meanwhile.
        parts = [replace(part, descriptor=os.dup(part.descriptor)) for part in snapshot.parts]
        own = replace(snapshot, parts=parts)

        def look() -> bool:
            try:
                return is_sound(own, sums)
            finally:
                close_all([part.descriptor for part in parts])

        self._errands.ask("memory", look, found)

    def _look_for_newest(self, attempt: _Attempt, *, older: bool) -> None:
        """Read the newest checkpoint while the command starts, and go on hearing everybody."""
        distrusted = dict(self._distrusted)
        skip = int(older)

        def newest() -> tuple[store.Checkpoint | None, list[store.SetAside]] | OSError:
            try:
                return store.newest(
                    self._disk, self._run.checkpoints, skip=skip, distrusted=distrusted
                )
            except OSError as error:
                return error

        self._errands.ask("newest", newest, lambda found: self._newest_found(found, attempt, skip))

    def _newest_found(
        self,
        found: tuple[store.Checkpoint | None, list[store.SetAside]] | OSError,
        attempt: _Attempt,
        skip: int,
    ) -> None:
        current = self._attempt
        if isinstance(found, OSError):
            if not self._read_once:
                raise found  # whoever launches has to see it; a job that ran before waits
            if current is not None and not current.ready:
                why = f"a failure to read its checkpoints ({found})"
                self._tell(machine.SpawnFailed(why, disk=True))
            return
        self._read_once = True
        newest, set_aside = found
        self._distrusted.clear()  # they are set aside; what gets their names now is another one
        self._say_set_aside(newest, set_aside)
        if current is None or current.ready:
            return  # it has ended meanwhile
        if current is not attempt:
            self._look_for_newest(current, older=bool(skip))
            return
        step = None if newest is None else newest.step
        before = self._state.ledger.durable_step
        if before is not None and not set_aside and not skip and (step is None or step < before):
            self._terminal.say(
                f"the checkpoint of step {before}, which was durable, is no longer in "
                f"{self._run.checkpoints}: somebody has removed it"
            )
        self._tell(machine.Found(step, len(self._checkpoints())))
        self._started(current, newest)

    def _say_set_aside(
        self, newest: store.Checkpoint | None, set_aside: list[store.SetAside]
    ) -> None:
        for one in set_aside:
            self._scribe.event("set aside", path=one.path.name, why=one.why)
            self._terminal.say(
                f"a checkpoint is damaged and was set aside as {one.path}: {one.why}"
            )
        if set_aside:
            using = "starting over" if newest is None else f"using the older step {newest.step}"
            self._terminal.say(using)

    def _start(self, snapshot: Job | None) -> _Attempt:
        """Start the command as the attempt that was claimed."""
        environment, said = environment_for(self._job, os.environ)
        environment[wire.ENV_SOCKET] = self._server.address
        environment.pop(wire.ENV_REMOTE, None)  # of a supervisor around this one
        if self._relays is not None:
            environment[wire.ENV_REMOTE] = self._relays.invite().text()
        if said:
            self._terminal.say(said)
        output, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            child = Child(
                self._job.argv,
                cwd=Path(self._job.cwd),
                environment=environment,
                output=write_end,
                inherited=[self._lock],
            )
        except OSError:
            os.close(output)
            raise
        finally:
            os.close(write_end)
        attempt = _Attempt(self._number, child, output, Ranks(), None, snapshot, OomWatch())
        self._attempt = attempt
        self._rhythm.started()
        self._gauge.started(self._clock.now_s(), from_memory=snapshot is not None)
        self._last_lines.clear()
        self._unended = b""
        self._watch(child, self._child_ended)
        self._selector.register(output, selectors.EVENT_READ, self._output_came)
        self._note_supervisor()
        return attempt

    def _started(self, attempt: _Attempt, newest: store.Checkpoint | None) -> None:
        """It runs: what it will restore is known, before anybody answers its worker."""
        snapshot = attempt.memory
        attempt.ready = True
        attempt.checkpoint = None if newest is None else newest.path
        step = None if newest is None else newest.step
        at = "from the beginning" if step is None else f"from step {step}"
        if newest is not None:
            attempt.of_ranks = manifests.ranks_in(newest.manifest.files)
        if snapshot is not None:
            step, attempt.of_ranks = snapshot.step, len(snapshot.parts)
            at = f"from step {step} in memory"
        attempt.from_step = step or 0
        source = "disk" if snapshot is None else "memory"
        pid = attempt.child.pid
        self._scribe.event("started", attempt=self._number, pid=pid, step=step, of=source)
        self._terminal.say(f"run {self._job.name!r}, attempt {self._number}, {at}")
        self._host.ready()
        self._tell(machine.Spawned())
        while self._waiting:
            self._welcome(*self._waiting.pop(0))

    def _receipt(self, generation: int, why: str | None) -> None:
        attempt = self._attempt
        for rank, number in self._sent.get(generation, {}).items():
            worker = None if attempt is None else attempt.ranks.worker(rank)
            if worker is not None and worker.peer is not None:
                durable = wire.Durable(number)
                worker.peer.send(durable if why is None else wire.NotDurable(number, why))

    def _end(self, code: int) -> None:
        if code == Exit.GAVE_UP:
            rest = [self._unended] if self._unended else []
            self._terminal.report([*self._last_lines, *rest], self._run)
        for peer in (*self._askers, *self._stop_askers):
            durable = self._state.ledger.durable_step
            text = f"the job ended with exit code {code}; newest durable step: {durable}"
            peer.send(wire.Answer(code in (Exit.FINISHED, Exit.INTERRUPTED), text, {}))
        self._code = code

    def _end_attempt(self) -> None:
        """Take what is left of the output, and let go of the attempt."""
        attempt = self._attempt
        if attempt is None:
            return
        self._drain_output(attempt)
        for worker in attempt.ranks:
            self._drop(worker)
        while self._waiting:
            self._waiting.pop()[0].close()
        for source in (attempt.child, attempt.output):
            self._forget(source)
        attempt.child.close()
        attempt.ranks.close()
        os.close(attempt.output)
        self._sent.clear()
        self._attempt = None

    def _checkpoints(self) -> list[str]:
        """The names of the checkpoints that there are, newest first; none of them is read."""
        return retention.newest_first(self._disk.names(self._run.checkpoints))

    # -------------------------------------------------------------- facts

    def _signals_came(self) -> None:
        for number in self._signals.take():
            self._signalled(number)

    def _signalled(self, number: int) -> None:
        if number == machine.INT:
            self.stopped_by_owner = True
        self._tell(machine.Signalled(number))
        if number != machine.USR2:
            self._ask_host()

    def _ask_host(self) -> None:
        """How long the host leaves; the worker saves itself meanwhile."""
        if machine.deadline(self._state) is None:
            return
        asked_s = self._clock.now_s()

        def noticed(notice: HostNotice) -> None:
            overruled = notice.assumed and self._policy.grace_given
            if notice.left_s is not None and not overruled:
                left_s = max(notice.left_s - (self._clock.now_s() - asked_s), 0.0)
                self._tell(machine.HostLimited(left_s, notice.why))
            elif notice.why is not None:
                self._scribe.event("told", text=notice.why)

        self._errands.ask("host", self._host.notice, noticed)

    def _child_ended(self) -> None:
        attempt = self._attempt
        assert attempt is not None, "only then is it watched"
        code = attempt.child.exit_code()
        if code is not None:
            self._forget(attempt.child)
            self._hear_worker_out(attempt)
            if not attempt.ready:
                self._scribe.event("started", attempt=self._number, pid=attempt.child.pid)
                attempt.ready = True  # what it would have restored is of no use any more
            cause = ("" if code == 0 else attempt.oom.found(code)) or ""
            if code != 0 and not cause and attempt.ranks.lost is not None:
                cause = _lost(attempt.ranks)
            if code != 0:
                self._gauge.last_failure = f"{described(code)} {cause}".rstrip()
            self._tell(machine.Exited(code, self._step(), cause))

    def _hear_worker_out(self, attempt: _Attempt) -> None:
        """What the worker sent before it died counts, whichever descriptor was looked at first."""
        for worker in attempt.ranks:
            while worker.peer is not None and _readable(worker.peer):
                self._worker_spoke(worker)

    def _write_ended(self) -> None:
        done: Done = self._writer.take()
        if done.why is None:
            self._sums[done.generation] = done.files
            taken_s = self._held[done.generation].came_s
            took_s = self._gauge.written(self._clock.now_s(), taken_s)
            self._tell(machine.Published(done.generation, done.step, took_s))
        else:
            self._tell(machine.PublishFailed(done.generation, done.why, done.fenced))

    def _output_came(self) -> None:
        attempt = self._attempt
        assert attempt is not None, "only then is it watched"
        chunk = os.read(attempt.output, _CHUNK)
        if chunk:
            self._pass_on(chunk)
        else:
            self._forget(attempt.output)

    def _drain_output(self, attempt: _Attempt) -> None:
        while _readable(attempt.output) and (chunk := os.read(attempt.output, _CHUNK)):
            self._pass_on(chunk)

    def _pass_on(self, chunk: bytes) -> None:
        lines = (self._unended + chunk).splitlines(keepends=True)
        ended = not lines or lines[-1].endswith((b"\n", b"\r"))
        self._unended = b"" if ended else lines.pop()[-_CHUNK:]
        self._last_lines.extend(line.rstrip(b"\r\n") for line in lines)
        self._scribe.output(chunk)
        self._terminal.pass_on(chunk)

    # -------------------------------------------------------------- the socket

    def _somebody_connected(self) -> None:
        peer = self._server.accept()
        self._watch(peer, lambda: self._introduce(peer))

    def _introduce(self, peer: Peer) -> None:
        """The first message says who it is."""
        self._forget(peer)
        try:
            received = peer.receive()
        except ProtocolError as error:
            self._terminal.say(str(error))
            received = None
        if received is None:
            peer.close()
            return
        message, descriptors = received
        close_all(descriptors)
        if isinstance(message, wire.Hello):
            if self._attempt is not None and not self._attempt.ready:
                self._waiting.append((peer, message))
            else:
                self._welcome(peer, message)
        elif isinstance(message, wire.Ask):
            self._asked(peer, message)
        else:
            peer.close()

    def _welcome(self, peer: Peer, hello: wire.Hello) -> None:
        attempt = self._attempt
        why = None
        if hello.protocol != wire.PROTOCOL:
            why = f"it speaks protocol {hello.protocol}, this supervisor {wire.PROTOCOL}"
        elif attempt is None:
            why = "no attempt runs"
        else:
            why = attempt.ranks.refusal(hello)
            if why is None and attempt.of_ranks not in (None, hello.world_size):
                why = (
                    f"the job is of {hello.world_size} ranks now, and what it continues from of "
                    f"{attempt.of_ranks}: start it with as many as before, or start over with "
                    "`ckptd launch --fresh`"
                )
                self._refused(MismatchError.__name__, why)
        if why is not None or attempt is None:
            peer.send(wire.TurnedAway(why or ""))
            peer.close()
            return
        if self._job.facts is None:
            self._job = msgspec.structs.replace(self._job, facts=hello.environment)
            job = self._job
            self._scribe.do(lambda: self._write_down(job))  # without waiting for the disk
            first = None
        else:
            first = self._job.facts
        checkpoint = None if attempt.checkpoint is None else str(attempt.checkpoint)
        state = None if attempt.memory is None else attempt.memory.parts[hello.rank]
        worker = attempt.ranks.admit(hello, peer)
        attempt.came_s = min(attempt.came_s, self._clock.now_s())
        peer.send(
            wire.Welcome(
                self._job.name,
                str(self._run.path),
                attempt.number,
                checkpoint,
                first,
                self._policy.keep,
                self._generation,
                None if state is None else state.snapshot.table,
            ),
            [
                *(worker.page_fd, self._lock, attempt.output),
                *([] if state is None else [state.descriptor]),
            ],
        )
        self._watch(peer, lambda: self._hear(worker))
        ranks = attempt.ranks
        said = {"pid": hello.pid, **({"remote": True} if hello.remote else {})}
        if ranks.size > 1:
            self._scribe.event("rank attached", rank=worker.rank, ranks=ranks.size, **said)
        if ranks.complete():
            self._scribe.event("attached", attempt=attempt.number, **said)
            own = not hello.remote and hello.pid == attempt.child.pid
            self._tell(machine.WorkerAttached(own=own))
            self._act_on_advice()

    def _hear(self, worker: Worker) -> None:
        """It has spoken, but maybe was heard out already, in this same turn: then it is silent."""
        if worker.peer is not None and _readable(worker.peer):
            self._worker_spoke(worker)

    def _worker_spoke(self, worker: Worker) -> None:
        attempt = self._attempt
        assert attempt is not None, "only then is it watched"
        assert worker.peer is not None, "the same"
        self._rhythm.alive()
        try:
            received = worker.peer.receive()
        except ProtocolError as error:
            self._terminal.say(str(error))
            return
        if received is None:
            self._drop(worker)
            self._detached(worker, attempt)
            return
        message, descriptors = received
        if isinstance(message, wire.Snapshot) and len(descriptors) == 1:
            try:
                table = wire.table_in(memory.readable(descriptors[0]), message.table)
            except (ProtocolError, OSError, ValueError) as error:
                close_all(descriptors)
                self._unreadable(worker, message.generation, str(error))
                return
            self._gather(Part(worker.rank, message, table, descriptors[0]), attempt)
            return
        close_all(descriptors)
        self._heard(message, worker, attempt.ranks)

    def _gather(self, part: Part, attempt: _Attempt) -> None:
        """A rank's snapshot: a state, as soon as there is one of each rank."""
        now_s, ranks = self._clock.now_s(), attempt.ranks
        differ = ranks.answered(part, now_s)
        parts, dropped = ranks.gather(part)
        self._let_go(dropped, attempt.number)
        if differ is not None:
            self._tell_apart(differ)
        if parts is None:
            return
        self._generation += 1
        job = Job(self._generation, parts, attempt.number, now_s)
        self._held[job.generation] = job
        self._sent[job.generation] = {one.rank: one.snapshot.generation for one in parts}
        while len(self._sent) > _SENT_MAX:
            del self._sent[next(iter(self._sent))]
        cost_s = max(one.snapshot.cost_s for one in parts)
        serial = min(ranks.serial_of(one.snapshot.asked) for one in parts)
        self._gauge.taken(now_s, cost_s)
        self._tell(machine.SnapshotCame(job.generation, job.step, serial, cost_s))

    def _stood(self, worker: Worker, ranks: Ranks, message: wire.Standing) -> None:
        """A rank says that an earlier snapshot stands; the state of which it is a part."""
        now_s = self._clock.now_s()
        rank, states = worker.rank, self._sent.values()
        numbers = ranks.stood(rank, message.asked, message.generation, now_s, states=states)
        if isinstance(numbers, str):
            self._tell_apart(numbers)
        for generation, sent in self._sent.items():
            if sent == numbers:
                self._tell(machine.Stood(generation, ranks.serial_of(message.asked)))

    def _tell_apart(self, text: str) -> None:
        self._scribe.event("told", text=text)
        self._terminal.say_once(text)

    def _detached(self, worker: Worker, attempt: _Attempt) -> None:
        """A worker's connection ended: of several ranks the others can't go on without it."""
        ranks = attempt.ranks
        if ranks.size > 1 and not worker.finished and ranks.lost is None:
            ranks.lost = worker.rank
            attempt.lost_s = self._clock.now_s()
        self._tell(machine.WorkerDetached())

    def _look_for_lost(self, now_s: float) -> None:
        """Launchers end what is left when a rank dies, but not all of them do."""
        attempt = self._attempt
        if attempt is not None and now_s - attempt.came_s > _COMES_S:
            missing = attempt.ranks.missing()
            if missing:
                self._terminal.say_once(
                    f"of {attempt.ranks.size} ranks, {missing} has not called ckptd.attach yet: "
                    "every rank has to. Until then nothing can be saved"
                )
        if attempt is not None and now_s - attempt.lost_s > _LOST_S:
            attempt.lost_s = math.inf
            self._gauge.last_failure = _lost(attempt.ranks)
            self._tell(machine.WorkerLost(_lost(attempt.ranks), self._step()))

    def _unreadable(self, worker: Worker, generation: int, why: str) -> None:
        """A snapshot is not what its message says: it is as one that could not be written."""
        self._terminal.say(why)
        self._generation += 1
        self._sent[self._generation] = {worker.rank: generation}
        if self._state.ledger.writing is None:
            self._tell(machine.PublishFailed(self._generation, why, fenced=False))
        else:  # the machine would take it for that one
            self._receipt(self._generation, why)

    def _heard(self, message: wire.ToSupervisor, worker: Worker, ranks: Ranks) -> None:
        match message:
            case wire.Sized(length):
                worker.length = length
                total = ranks.length()
                if total is not None:
                    self._check_space(total)
                    self._tell(machine.Sized(total))
            case wire.Seen():
                ranks.seen(worker.rank, message, self._clock.now_s())
            case wire.Standing():
                self._stood(worker, ranks, message)
            case wire.Restored(step, seconds):
                worker.restored_s = seconds
                slowest_s = ranks.restored_s()
                if slowest_s is not None:
                    self._scribe.event("restored", step=step, seconds=round(slowest_s, 3))
            case wire.Notice(number):
                self._noticed(number, ranks)
            case wire.Short(needed, available):
                self._terminal.say_once(
                    f"a snapshot needs {needed >> 20} MiB of memory, {available >> 20} MiB are "
                    "free: the newest one is not kept in memory any more; after a crash the job "
                    "starts again from the disk"
                )
                self._tell(machine.MemoryShort())
            case wire.Said(text):
                if ranks.is_news(text):
                    self._scribe.event("said", text=text)
                    self._terminal.say(text if worker.rank == 0 else f"rank {worker.rank}: {text}")
            case wire.Refused(error, text):
                self._scribe.event("refused", error=error, text=text)
                self._refused(error, text)
            case wire.Bye(finished):
                worker.finished = finished
                if not finished or ranks.finished():
                    self._tell(machine.WorkerSaidBye(finished))
            case _:
                self._terminal.say(f"the worker sent a {type(message).__name__}: ignored")

    def _noticed(self, number: int, ranks: Ranks) -> None:
        """A worker was signalled: by the host, or by its launcher because another rank has died."""
        self._notices.append(number)
        if len(self._notices) > 1:
            return  # heard of while the others are heard out, below
        attempt = self._attempt
        if attempt is not None and ranks.size > 1:
            self._hear_worker_out(attempt)  # of two that came at once, an end is the reason
        notices, self._notices = self._notices, []
        for one in notices:
            if ranks.lost is None:
                self._signalled(one)

    def _refused(self, error: str, text: str) -> None:
        attempt = self._attempt
        if (
            error == DamagedError.__name__
            and attempt is not None
            and attempt.checkpoint is not None
        ):
            # It was sound when we read it. The next start sets it aside and uses the one before.
            self._distrusted[attempt.checkpoint] = text
        else:
            self._tell(machine.WorkerRefused(text))

    def _check_space(self, length: int) -> None:
        """Before the first step: that no disk is full at three in the morning."""

        def short() -> tuple[int, str] | None:
            try:
                free, there = disk.free(self._run.path), len(self._checkpoints())
            except OSError:
                return None  # the first write says what is wrong with this disk
            said = space_short(length, self._policy.keep, there, free)
            return None if said is None else (free, said)

        def found(said: tuple[int, str] | None) -> None:
            if said is not None:
                self._scribe.event("space is short", needed=length, free=said[0])
                self._terminal.say(f"{self._run.path}: {said[1]}")

        self._errands.ask("space", short, found)

    def _drop(self, worker: Worker) -> None:
        if worker.peer is not None:
            self._forget(worker.peer)
            worker.peer.close()
            worker.peer = None

    def _asked(self, peer: Peer, ask: wire.Ask) -> None:
        if ask.what == "status":
            peer.send(wire.Answer(ok=True, text=self._summary(), facts=self._facts()))
            peer.close()
        elif ask.what == "stop":
            self._stop_askers.append(peer)
            self.stopped_by_owner = True
            self._tell(machine.StopAsked())
            self._ask_host()
        elif ask.what == "checkpoint":
            self._askers.append(peer)
            self._tell(machine.CheckpointAsked())
        else:
            peer.send(wire.Answer(ok=False, text=f"unknown question {ask.what!r}", facts={}))
            peer.close()

    # -------------------------------------------------------------- looking at it

    def _step(self) -> int:
        page = None if self._attempt is None else self._attempt.ranks.page()
        return 0 if page is None else int(page.words[wire.WORD_STEP])

    def _glance(self, now_s: float) -> None:
        """Bring the rate and the terminal's line up to date, about once a second."""
        looked_s = self._gauge.looked_s()
        if looked_s is not None and now_s - looked_s < _GLANCE_S:
            return
        step, attempt = self._step(), self._attempt
        self._gauge.moved(now_s, step, begins=attempt is None or step <= attempt.from_step)
        self._look_for_lost(now_s)
        self._look_for_hang(now_s)
        self._tell_host(now_s)
        writing = self._state.ledger.writing
        if writing is not None and self._gauge.writes_for_s(now_s) > SLOW_WRITE_S:
            held = self._state.ledger.held or writing
            goes_on = isinstance(self._state.phase, machine.Attached)
            self._terminal.say_once(
                f"the checkpoint of step {writing.step} ({sized(self._state.length)}) has been "
                f"written for {SLOW_WRITE_S:.0f} s now: the disk under {self._run.path} is slow or "
                f"does not answer. In memory is the state of step {held.step}"
                + (", and training goes on" if goes_on else "")
            )
        self._terminal.progress(self._summary)

    def _look_for_hang(self, now_s: float) -> None:
        attempt = self._attempt
        if attempt is None or not attempt.ranks.anybody():
            return
        step = self._step()
        first = step <= attempt.from_step
        here = [worker.pid for worker in attempt.ranks if not worker.remote]
        stopped = [pid for pid in here if stacks.is_stopped(pid)]
        for pid in stopped:
            self._terminal.say_once(
                f"process {pid} was stopped (SIGSTOP, or a debugger): that is no hang, and it may "
                "stay so"
            )
        self._rhythm.look(now_s, step, attempt.ranks.items(), first=first, stopped=bool(stopped))
        idle_s = self._rhythm.idle_s
        if self._rhythm.hangs():
            self._gauge.last_failure = f"a hang at step {step}"
            self._tell(machine.Stalled(idle_s, step))

    def _tell_host(self, now_s: float) -> None:
        self._host.alive()
        self._host.status(self._summary)
        reads = self._attempt is not None and not self._attempt.ready
        runs = isinstance(self._state.phase, machine.Pausing | machine.Attached)
        if reads and self._gauge.runs_s(now_s) > _READS_S:
            self._host.more_time(_MORE_TIME_S)  # a large checkpoint, before it is ready
        elif not runs and machine.deadline(self._state) is not None:
            self._host.more_time(_MORE_TIME_S)  # it ends: at a deadline of the machine's

    def _facts(self) -> Facts:
        attempt = self._attempt
        return self._gauge.facts(
            self._state,
            self._clock.now_s(),
            attempt=self._number,
            page=None if attempt is None else attempt.ranks.page(),
            works=attempt is not None and attempt.ranks.attached(),
            ranks="" if attempt is None else attempt.ranks.described(),
        )

    def _summary(self) -> str:
        return summary(self._facts())

    # -------------------------------------------------------------- the small things

    def _note_supervisor(self) -> None:
        pid = os.getpid()
        started = children.started_s(pid)
        assert started is not None, "we run"
        child = None if self._attempt is None else self._attempt.child.pid
        self._noted = SupervisorFile(
            pid=pid,
            started=started,
            host=os.uname().nodename,
            boot=boot_id(),
            socket=self._server.address,
            child=child,
            child_started=None if child is None else children.started_s(child),
            node=slurm.node(),
            job=self._host.job,
            restart=self._host.restart,
        )
        if self._attempt is None:
            self._run.write(self._noted)  # whoever launches has to see that it can't be written
        else:
            # At once, as the attempt was claimed: who comes after us, if we are killed, finds the
            # command by this.
            self._write_down(self._noted)

    def _write_down(self, content: JobFile | SupervisorFile) -> None:
        """Replace one of the run's files; the job runs also where that can't be written."""
        try:
            self._run.write(content)
        except OSError as error:
            self._terminal.say_once(f"{self._run.path} can't be written: {error.strerror}")

    def _forget_supervisor(self) -> None:
        if self._noted is None:
            return
        try:
            self._run.forget_supervisor(self._noted)
        except OSError as error:
            # A disk that failed must not change the exit code; that file names a dead process.
            self._terminal.say(f"supervisor.json could not be removed: {error}")

    def _forget(self, source: Any) -> None:
        try:
            self._selector.unregister(source)
        except KeyError:
            return  # it ended before: nobody watches it any more

    def _close(self) -> None:
        """However the loop ended: no process of the job outlives it."""
        self._kill()
        if self._attempt is not None:
            until_s = self._clock.now_s() + self._policy.kill_s
            while not self._is_gone() and self._clock.now_s() < until_s:
                self._kill()
                self._selector.select(_TREE_POLL_S)
            self._end_attempt()
        self._terminal.progress(None)
        self._scribe.do(self._forget_supervisor)
        if not self._scribe.drain(self._policy.kill_s):
            self._terminal.say(
                f"the disk under {self._run.path} does not answer: the last lines of the log and "
                "the journal may be missing"
            )
        for peer in (*self._askers, *self._stop_askers):
            peer.close()
        if self._relays is not None:
            self._relays.close()
        self._server.close()
        self._signals.close()
        self._selector.close()


def _lost(ranks: Ranks) -> str:
    return f"rank {ranks.lost} of {ranks.size} ended first"


def _readable(source: Any) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        return bool(selector.select(0))
