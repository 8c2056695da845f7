"""Ranks whose supervisor is gone: they agree among themselves, and save together.

Rules:

1. What they have in common is the run's directory: they tell each other by small files in a
   directory of the attempt there, each made under another name and renamed.
2. Where each is, is told by a thread of its own, since a rank may sit in a collective that another
   one has to come to. All read the same and decide the same (`agree.target`): nobody leads.
3. At the safe point upon which they agreed, each leaves its snapshot there. The first rank
   publishes all of them as one checkpoint, as the supervisor would have, and tells the others.
4. Whoever does not hear of the others for long gives up: the last checkpoint stands.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from ckptd import agree, wire
from ckptd.errors import CkptdError, SilentRanksError
from ckptd.host.disk import Disk
from ckptd.store import retention

T = TypeVar("T")

_POLL_S: Final = 0.02
_PAUSE_S: Final = 0.25
#: A file that another machine made may be seen a minute later on a network file system.
_AGREE_WITHIN_S: Final = 150.0
_SAVE_WITHIN_S: Final = 900.0


class Told(msgspec.Struct, frozen=True):
    """A rank has left its snapshot: where it was taken, and where its table is in that."""

    step: int
    place: str
    table: wire.Place


class Outcome(msgspec.Struct, frozen=True):
    """What became of it; `why` empty: it is durable."""

    why: str


class Orphans:
    """One rank among those of an attempt.

    Args:
        disk: where the run is.
        run: its directory.
        attempt: the attempt's number.
        rank: this one.
        ranks: how many there are.
    """

    def __init__(self, disk: Disk, run: Path, attempt: int, rank: int, ranks: int) -> None:
        self._disk, self._rank, self._ranks = disk, rank, ranks
        # It is no checkpoint, whatever happens, and who publishes the next one removes it.
        self._board = run / "checkpoints" / f"{retention.TEMPORARY}orphans-{attempt}"
        #: Why there will be no agreement; None: there may be.
        self.failed: str | None = None

    def agree(self, page: wire.StatusPage) -> None:
        """Begin to agree where to save; the page says it, as for a supervisor's request."""
        threading.Thread(target=self._agree, args=[page], name="orphans", daemon=True).start()

    def _agree(self, page: wire.StatusPage) -> None:
        try:
            self._go_round(page)
        except (CkptdError, OSError) as error:
            self.failed = str(error)

    def _go_round(self, page: wire.StatusPage) -> None:
        number = 0
        while True:
            word = word_of(number)
            page.words[wire.WORD_REQUEST] = word
            time.sleep(agree.SEEN_S)
            self._tell(f"round-{number}", page.position())
            positions = self._hear(f"round-{number}", agree.Position, _AGREE_WITHIN_S)
            patient = number < agree.PATIENT_TRIES
            target = agree.target(list(positions.values()), patient=patient)
            page.agree(word, target)
            if target is not None:
                return
            time.sleep(_PAUSE_S)
            number += 1

    def leave_snapshot(self, told: Told, content: memoryview) -> None:
        """Hand this rank's snapshot to the first rank."""
        self._prepare()
        self._disk.write(self._snapshot(self._rank), content)
        self._tell("left", told)

    def snapshots(self, told: Told) -> dict[int, tuple[Told, Path]]:
        """For the first rank: those that the others have left, by rank.

        Raises:
            SilentRanksError: one did not come, or was taken elsewhere.
        """
        self._tell("left", told)
        found = self._hear("left", Told, _SAVE_WITHIN_S)
        for rank, other in found.items():
            if other.place != told.place:
                raise SilentRanksError(f"rank {rank} was at {other.place}, rank 0 at {told.place}")
        return {rank: (other, self._snapshot(rank)) for rank, other in found.items() if rank}

    def tell_outcome(self, why: str) -> None:
        """For the first rank: say why it is not durable; empty: it is.

        The directory is made anew: what was published has removed it.
        """
        self._tell("outcome", Outcome(why))

    def check_outcome(self) -> None:
        """For the others: wait until it is durable.

        Raises:
            SilentRanksError: it is not, or nobody said.
        """
        (outcome,) = self._hear("outcome", Outcome, _SAVE_WITHIN_S, of=[0]).values()
        if outcome.why:
            raise SilentRanksError(outcome.why)

    # -------------------------------------------------------------- the board

    def _snapshot(self, rank: int) -> Path:
        return self._board / f"snapshot.{rank}"

    def _prepare(self) -> None:
        for directory in (self._board.parent, self._board):
            if directory.name not in self._disk.names(directory.parent):
                try:
                    self._disk.make_directory(directory)
                except FileExistsError:
                    continue  # another rank was faster

    def _tell(self, topic: str, what: object) -> None:
        self._prepare()
        made = self._board / f"made.{topic}.{self._rank}"
        self._disk.write(made, msgspec.json.encode(what))
        self._disk.rename(made, self._board / f"{topic}.{self._rank}")

    def _hear(
        self, topic: str, kind: type[T], within_s: float, of: list[int] | None = None
    ) -> dict[int, T]:
        """What the ranks have told."""
        wanted = list(range(self._ranks)) if of is None else of
        until_s = time.monotonic() + within_s
        heard: dict[int, T] = {}
        while len(heard) < len(wanted):
            names = self._disk.names(self._board)
            for rank in wanted:
                if rank not in heard and f"{topic}.{rank}" in names:
                    content = bytes(self._disk.read(self._board / f"{topic}.{rank}"))
                    heard[rank] = msgspec.json.decode(content, type=kind)
            if len(heard) < len(wanted):
                if time.monotonic() > until_s:
                    silent = ", ".join(str(rank) for rank in wanted if rank not in heard)
                    raise SilentRanksError(
                        f"the supervisor is gone, and rank {silent} did not answer within "
                        f"{within_s:.0f} s: this state is not saved, the last checkpoint stands"
                    )
                time.sleep(_POLL_S)
        return heard


def word_of(number: int) -> int:
    """The request word of a round; larger than any of a supervisor's."""
    return wire.request_word(2**60 + number, wire.Request.ORPHANED)
