"""The workers of one attempt: a single process, or the ranks of a distributed job.

Rules:

1. A job is as many ranks as its first worker says (`WORLD_SIZE`), and it is attached when all are.
2. Each has a connection, a status page and memories of its own. What they sent makes a state only
   together: one snapshot of each, all taken at the same place of the script.
3. A single process is asked through its page and answers at its next safe point. Several are asked
   where they are first, and told at which safe point to answer (`agree`).
4. Of a rank on another machine the page here shows what its relay last heard. Requests are also
   sent to it, and where it is counts only when it has said so after the request was there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Final

from ckptd import agree, wire
from ckptd.agree import Position
from ckptd.host import memory
from ckptd.host.children import Stranger
from ckptd.supervisor.server import Peer
from ckptd.supervisor.writer import Part

#: Within so long ranks on other machines say where they are. Less than the ranks of this machine
#: stand still for it.
_SAY_S: Final = 5.0
#: Of a process that is told to end at once. Less than `Policy.kill_s`.
_ANSWERS_WITHIN_S: Final = 8.0
_ASK_AGAIN_S: Final = 0.02  # then twice as long, and so on: patient for about two seconds
_ASK_AGAIN_S_MAX: Final = 0.5
#: How often to ask again where they agreed upon what is far.
_FAR_AGAIN_S: Final = 2.0
#: They wait for longer than that, but if we come so late we were stopped: they may have gone on.
_LATE_S: Final = 2.0
_NAMED_MAX: Final = 8
_PENDING_MAX: Final = 2  # snapshots of one rank that wait for those of the others


@dataclass
class Worker:
    """One rank.

    Attributes:
        peer: its connection; None: it ended.
        stranger: its process, where that is no descendant of ours.
        remote: it is on another machine, and its process id is of there.
        killed_s: when it was told there to end; infinite: it was not.
        length: about how many bytes its snapshot will have; None: it has not said yet.
        finished: what it said of its end; None: nothing.
        seen: on another machine: the newest request that stands in its page, and where it is since.
    """

    rank: int
    pid: int
    page_fd: int
    page: wire.StatusPage
    peer: Peer | None
    stranger: Stranger | None
    remote: bool = False
    killed_s: float = math.inf
    length: int | None = None
    restored_s: float | None = None
    finished: bool | None = None
    seen: tuple[int, Position] = (0, ())

    def ask(self, word: int) -> None:
        """Write a request into its page."""
        self.page.words[wire.WORD_REQUEST] = word
        if self.remote and self.peer is not None:
            self.peer.send(wire.Asked(word))

    def agree(self, word: int, target: Position | None) -> None:
        """Write into its page upon what was agreed."""
        self.page.agree(word, target)
        if self.remote and self.peer is not None:
            self.peer.send(wire.Agreed(word, target))

    def position(self, word: int) -> Position | None:
        """Where it is since it was asked; None: that is not known yet."""
        if not self.remote:
            return self.page.position()
        return self.seen[1] if self.seen[0] == word else None

    def kill(self, now_s: float) -> None:
        """End it, where killing our descendants does not."""
        if self.stranger is not None:
            self.stranger.kill()
        elif self.remote and self.peer is not None and math.isinf(self.killed_s):
            self.killed_s = now_s
            self.peer.send_or_drop(wire.Kill())

    def is_gone(self, now_s: float) -> bool:
        """Whether it has ended, as far as that is not seen by our descendants."""
        if self.remote:
            # A machine that does not answer is taken for lost. What may run there still has the
            # number and the secret of an attempt that is over: it can publish nothing and not join.
            return self.peer is None or now_s - self.killed_s > _ANSWERS_WITHIN_S
        return self.stranger is None or self.stranger.is_gone()


@dataclass
class _Request:
    """A request to several ranks, until all have answered it.

    Attributes:
        word: as it stands in the pages.
        words: that, and what stood there before.
        target: upon which safe point they agreed; None: not yet.
        due_s: when to look where they are, or to ask again; infinite: they know where to answer.
        until_s: how long to wait for ranks on other machines to say where they are.
        answers: the snapshot by which each has answered, by rank.
        standing: the earlier snapshot that stands for each that is in a restart loop, by rank.
    """

    serial: int
    leave: bool
    word: int = 0
    due_s: float = math.inf
    until_s: float = math.inf
    frozen: bool = True
    tries: int = 0
    words: set[int] = field(default_factory=set)
    target: Position | None = None
    answers: dict[int, wire.Snapshot] = field(default_factory=dict)
    standing: dict[int, int] = field(default_factory=dict)


class Ranks:
    """See the module.

    Attributes:
        size: how many ranks there are; 0: nobody has attached yet.
        lost: the rank that ended first although it had not finished; None: none has.
    """

    def __init__(self) -> None:
        self.size = 0
        self.lost: int | None = None
        self._workers: dict[int, Worker] = {}
        self._first = _page()
        self._request: _Request | None = None
        self._words: dict[int, int] = {}  # of the requests to several ranks: their serials
        self._pending: dict[str, dict[int, Part]] = {}
        self._told: set[str] = set()

    # -------------------------------------------------------------- who is there

    def page(self) -> wire.StatusPage:
        """The first rank's; it is there before that has attached."""
        return self._first[1]

    def admit(self, hello: wire.Hello, peer: Peer) -> Worker:
        """Take a worker in that `refusal` did not refuse."""
        self.size = hello.world_size
        page_fd, page = self._first if hello.rank == 0 else _page()
        stranger = None if hello.remote else Stranger.of(peer.pid())
        worker = Worker(hello.rank, hello.pid, page_fd, page, peer, stranger, hello.remote)
        self._workers[hello.rank] = worker
        return worker

    def refusal(self, hello: wire.Hello) -> str | None:
        """Why a process can't be one of this job's workers; None: it can."""
        if not 0 <= hello.rank < hello.world_size:
            return f"it says that it is rank {hello.rank} of {hello.world_size}"
        if self.size not in (0, hello.world_size):
            return f"it is one of {hello.world_size} ranks, and one of {self.size} has attached"
        if hello.rank not in self._workers:
            return None
        if self.size == 1:
            return "another process of this attempt has attached already (one script, one job)"
        return (
            f"rank {hello.rank} of this attempt has attached already. If torchrun has started it "
            "again: ckptd starts the whole job again, leave --max-restarts at 0"
        )

    def attached(self) -> bool:
        """Whether all ranks have attached, and none has ended."""
        return 0 < self.size == sum(worker.peer is not None for worker in self)

    def anybody(self) -> bool:
        """Whether any rank is attached."""
        return any(worker.peer is not None for worker in self)

    def missing(self) -> str:
        """Which of them have not attached, for a person; empty: none."""
        missing = [str(rank) for rank in range(self.size) if rank not in self._workers]
        few = ", ".join(missing[:_NAMED_MAX])
        return few if len(missing) <= _NAMED_MAX else f"{few} and {len(missing) - _NAMED_MAX} more"

    def described(self) -> str:
        """How many of several ranks are attached, for a person; empty: it is no such job."""
        if self.size < 2:
            return ""
        attached = sum(worker.peer is not None for worker in self)
        return str(self.size) if attached == self.size else f"{attached} of {self.size} attached"

    def complete(self) -> bool:
        """Whether all ranks have attached, whatever became of them."""
        return 0 < self.size == len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter([self._workers[rank] for rank in sorted(self._workers)])

    def worker(self, rank: int) -> Worker | None:
        """The worker of a rank; None: it has not attached."""
        return self._workers.get(rank)

    def finished(self) -> bool:
        """Whether all have said that they came to their end."""
        return self.complete() and all(worker.finished for worker in self)

    def length(self) -> int | None:
        """About how many bytes a snapshot of all will have; None: not all have said."""
        lengths = [worker.length or 0 for worker in self if worker.length is not None]
        return sum(lengths) if len(lengths) == self.size else None

    def restored_s(self) -> float | None:
        """How long the slowest took to restore; None: not all have."""
        seconds = [worker.restored_s or 0 for worker in self if worker.restored_s is not None]
        return max(seconds) if len(seconds) == self.size else None

    def is_news(self, text: str) -> bool:
        """Whether no other rank has said this already: most of it concerns all of them."""
        news = self.size == 1 or text not in self._told
        self._told.add(text)
        return news

    def items(self) -> int:
        """Items done in the open loops of all ranks: it changes while anybody gets on."""
        return sum(loop.done for worker in self for loop in worker.page.loops())

    def close(self) -> None:
        """Let go of everything."""
        for worker in self:
            if worker.peer is not None:
                worker.peer.close()
            if worker.stranger is not None:
                worker.stranger.close()
            if worker.rank:
                worker.page.close()
                os.close(worker.page_fd)
        self._first[1].close()
        os.close(self._first[0])
        for parts in self._pending.values():
            for part in parts.values():
                os.close(part.descriptor)

    # -------------------------------------------------------------- what they sent

    def gather(self, part: Part) -> tuple[list[Part] | None, list[Part]]:
        """A rank's snapshot came.

        Returns:
            One of each rank if they are whole now, by rank; and those of which no state will be
            made any more.
        """
        place = part.snapshot.place
        together = self._pending.setdefault(place, {})
        dropped = [together.pop(part.rank)] if part.rank in together else []
        together[part.rank] = part
        if len(together) == self.size:
            older = list(self._pending)[: list(self._pending).index(place)]
            dropped += [one for other in older for one in self._pending.pop(other).values()]
            del self._pending[place]
            return [together[rank] for rank in range(self.size)], dropped
        waiting = [parts for parts in self._pending.values() if part.rank in parts]
        if len(waiting) > _PENDING_MAX:
            # An answer, for which the others may just not be there yet, rather stays.
            before = [parts for parts in waiting if parts is not together]
            unasked = [parts for parts in before if not parts[part.rank].snapshot.asked]
            dropped.append((unasked or before)[0].pop(part.rank))
            self._pending = {where: parts for where, parts in self._pending.items() if parts}
        return None, dropped

    # -------------------------------------------------------------- asking them

    def ask(self, serial: int, now_s: float, *, leave: bool) -> None:
        """Ask all for a snapshot; `leave`: and to end when it is durable."""
        if self.size > 1:
            self._request = _Request(serial, leave)
            self._freeze(self._request, now_s)
        else:
            for worker in self:
                worker.ask(wire.request_word(serial, _kind(leave=leave)))

    def due_s(self) -> float:
        """When `look` has something to do; infinite: not by itself."""
        return math.inf if self._request is None else self._request.due_s

    def look(self, now_s: float) -> None:
        """See where the ranks are that were asked to stand still, and tell them where to answer."""
        request = self._request
        if request is None or now_s < request.due_s:
            return
        if not request.frozen and (request.answers or request.standing):
            request.due_s = math.inf  # the others come there too: who has answered is left alone
            return
        if not request.frozen or now_s > request.due_s + _LATE_S:
            self._freeze(request, now_s)
            return
        positions = [worker.position(request.word) for worker in self]
        known = [position for position in positions if position is not None]
        all_known = len(known) == len(positions)
        if not all_known and now_s < request.until_s:
            request.due_s = request.until_s  # or when the last one says it: see `seen`
            return
        # A rank that has come to the target may have answered: then that stays the target.
        if all_known and (request.target is None or max(known) < request.target):
            patient = request.tries < agree.PATIENT_TRIES
            request.target = agree.target(known, patient=patient)
        for worker in self:
            worker.agree(request.word, request.target)
        if request.target is None:
            self._ask_later(request, now_s)
        elif not all_known or agree.is_far(request.target, known):
            # They may be nearer to each other soon, and agree upon something that is not far.
            request.due_s, request.frozen = now_s + _FAR_AGAIN_S, False
        else:
            request.due_s = math.inf

    def seen(self, rank: int, message: wire.Seen, now_s: float) -> None:
        """A rank on another machine says where it is."""
        self._workers[rank].seen = message.word, message.position
        request = self._request
        if request is not None and request.frozen and request.word == message.word:
            request.due_s = min(request.due_s, now_s)  # it has waited for SEEN_S itself

    def answered(self, part: Part, now_s: float) -> str | None:
        """A rank has answered; what to say if the ranks did so at different places."""
        request = self._request
        if request is None or part.snapshot.asked not in request.words:
            return None
        request.answers.setdefault(part.rank, part.snapshot)
        if not self._is_answered(request):
            return None
        if len(_places(request)) == 1 and not request.standing:
            return None
        return self._ask_apart(request, now_s)

    def stood(
        self,
        rank: int,
        word: int,
        generation: int,
        now_s: float,
        *,
        states: Container[dict[int, int]],
    ) -> dict[int, int] | str | None:
        """A rank answered that an earlier snapshot stands.

        Args:
            rank: which.
            word: of the request.
            generation: the snapshot's.
            now_s: the time.
            states: which snapshots make one, each by rank. Those of loops of their own do not.

        Returns:
            Those of all ranks, once all have answered so; or what to say if that is no state.
        """
        if self.size == 1:
            return {rank: generation}
        request = self._request
        if request is None or word not in request.words:
            return None
        request.standing.setdefault(rank, generation)
        if not self._is_answered(request):
            return None
        if request.answers or request.standing not in states:
            return self._ask_apart(request, now_s)
        return request.standing

    def _is_answered(self, request: _Request) -> bool:
        """Whether all have; then the request is over."""
        if len(request.answers.keys() | request.standing.keys()) < self.size:
            return False
        self._request = None
        return True

    def _ask_apart(self, request: _Request, now_s: float) -> str:
        """They answered at different places: ask again; who would wait for a receipt goes on.

        Returns:
            What to say.
        """
        numbers = {rank: snapshot.generation for rank, snapshot in request.answers.items()}
        for rank, number in (numbers | request.standing).items():
            peer = self._workers[rank].peer
            if request.leave and peer is not None:
                peer.send(wire.Apart(number))
        self._request = _Request(request.serial, request.leave, tries=request.tries)
        self._ask_later(self._request, now_s)
        return (
            f"the ranks do not go through the same loops: {_where(_places(request))}. No "
            "checkpoint can be made there. A loop that not all ranks go through must be a plain "
            "`for`, without job.loop"
        )

    def serial_of(self, word: int) -> int:
        """The serial of the request that a word is; 0: it is none."""
        return self._words.get(word, 0) if self.size > 1 else wire.serial_of(word)

    def _freeze(self, request: _Request, now_s: float) -> None:
        word = wire.request_word(len(self._words) + 1, _kind(leave=request.leave))
        self._words[word] = request.serial
        request.word, request.frozen = word, True
        request.words.add(word)
        request.due_s, request.until_s = now_s + agree.SEEN_S, now_s + _SAY_S
        for worker in self:
            worker.ask(word)

    def _ask_later(self, request: _Request, now_s: float) -> None:
        request.due_s = now_s + min(_ASK_AGAIN_S * 2**request.tries, _ASK_AGAIN_S_MAX)
        request.tries += 1
        request.frozen = False


def _places(request: _Request) -> dict[str, int]:
    """Where they have answered, and a rank that was there."""
    return {snapshot.place: rank for rank, snapshot in request.answers.items()}


def _where(ranks: dict[str, int]) -> str:
    """Two different places, for a person."""
    if not ranks:
        return "each was in a loop that begins anew, and not all in the same one"
    (one, first), *others = sorted(ranks.items())
    if not others:
        return f"rank {first} was at {one}, others in a loop that begins anew"
    other, second = others[0]
    return f"rank {first} was at {one}, rank {second} at {other}"


def _kind(*, leave: bool) -> wire.Request:
    return wire.Request.LEAVE if leave else wire.Request.FLUSH


def _page() -> tuple[int, wire.StatusPage]:
    descriptor = memory.make("ckptd-status", wire.PAGE_BYTES)
    return descriptor, wire.StatusPage(memory.shared(descriptor, wire.PAGE_BYTES))
