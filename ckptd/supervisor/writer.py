"""The thread that publishes snapshots, so that the supervisor stays awake while a disk is slow.

At most one snapshot is written at a time (the machine sees to it). Results come back through a
queue and a descriptor that becomes readable.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from ckptd import wire
from ckptd.errors import CkptdError, FencedError, ProtocolError
from ckptd.host import memory
from ckptd.host.disk import Disk
from ckptd.store import manifest as manifests
from ckptd.store import store
from ckptd.store.manifest import File


@dataclass(frozen=True)
class Part:
    """What one rank sent of a state; the memfd stays the caller's."""

    rank: int
    snapshot: wire.Snapshot
    table: wire.Table
    descriptor: int


@dataclass(frozen=True)
class Job:
    """A whole state to publish.

    Attributes:
        generation: counts the states of one supervisor.
        parts: each rank's, in their order.
        attempt: whose it is.
        came_s: when it was whole.
    """

    generation: int
    parts: Sequence[Part]
    attempt: int
    came_s: float = 0.0

    @property
    def step(self) -> int:
        """Items of innermost loops that were done, as the first rank counts them."""
        return self.parts[0].snapshot.step


@dataclass(frozen=True)
class Done:
    """What became of it: durable (`why` None) with these files, or not, and why."""

    generation: int
    step: int
    why: str | None = None
    fenced: bool = False
    files: Mapping[str, File] = field(default_factory=dict)


class Writer:
    """Publishes into one run's checkpoints.

    Args:
        disk: where to.
        run: the run's directory.
        attempt: gives the current attempt's number.
        keep: checkpoints to keep.
        wall_s: the time of day.
        say: tells a person; called from the thread.
    """

    def __init__(
        self,
        disk: Disk,
        run: Path,
        attempt: Callable[[], int],
        keep: int,
        wall_s: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._disk, self._run, self._attempt = disk, run, attempt
        self._keep, self._wall_s, self._say = keep, wall_s, say
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._readable, self._wake = os.pipe2(os.O_CLOEXEC)
        threading.Thread(target=self._work, name="writer", daemon=True).start()

    def fileno(self) -> int:
        """Readable when a result is there."""
        return self._readable

    def publish(self, job: Job) -> None:
        """Begin to publish."""
        self._jobs.put(job)

    def take(self) -> Done:
        """The next result; only to be called when `fileno` is readable."""
        os.read(self._readable, 1)
        return self._done.get()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            done = self._publish(job)
            self._done.put(done)
            os.write(self._wake, b".")
            if done.why is None:
                self._prune()

    def _publish(self, job: Job) -> Done:
        attempt = self._attempt()
        try:
            done = publish(self._disk, self._run, job, attempt, self._wall_s())
        except FencedError as error:
            return Done(job.generation, job.step, str(error), fenced=True)
        except Exception as error:  # noqa: BLE001  # whatever it is, the machine waits for an end
            why = str(error) if isinstance(error, CkptdError | OSError) else repr(error)
            return Done(job.generation, job.step, why)
        return Done(job.generation, job.step, files=done.manifest.files)

    def _prune(self) -> None:
        try:
            store.prune(self._disk, self._run / "checkpoints", self._keep)
        except OSError as error:
            self._say(f"old checkpoints could not be removed: {error}")


def is_sound(job: Job, files: Mapping[str, File]) -> bool:
    """Whether a state in memory is still what was written: a dying process writes anywhere."""
    for part in job.parts:
        try:
            table = wire.table_in(memory.readable(part.descriptor), part.snapshot.table)
        except (ProtocolError, OSError, ValueError):
            return False
        if table != part.table:
            return False
    with _contents(job) as contents:
        return all(
            len(content) == files[name].length and manifests.sum_of(content) == files[name].xxh3_128
            for name, content in contents.items()
        )


def publish(disk: Disk, run: Path, job: Job, attempt: int, created: float) -> store.Checkpoint:
    """Publish a state that lies in memfds, after the outputs that it counts on.

    Raises:
        NotDurableError, OSError: the disk refused.
        FencedError: a newer attempt exists.
    """
    with _contents(job) as files:
        return store.publish_attempt(
            disk,
            run,
            step=job.step,
            attempt=attempt,
            files=files,
            outputs=[Path(output) for part in job.parts for output in part.table.outputs],
            created=created,
        )


def _contents(job: Job) -> AbstractContextManager[dict[str, memoryview]]:
    """All files of a state, by their names in the checkpoint."""
    return memory.pieces(
        (part.descriptor, manifests.in_checkpoint(part.rank, wire.places(part.table.files)))
        for part in job.parts
    )
