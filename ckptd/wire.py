"""Supervisor <-> worker: the messages and the status page, bytes both ways.

Rules:

1. Pure: bytes in, values out. Who owns a socket or a page is not known here.
2. The socket is a SOCK_SEQPACKET Unix socket: one message is one packet, so a message sent from a
   signal handler can't tear another one. A message is at most MESSAGE_BYTES_MAX long; whatever
   grows with a job (tensors, state.json, the lists of its files) travels in a memfd whose
   descriptor rides on the packet, and a text for a person is cut to what fits.
3. Requests go to the worker through the status page and nowhere else: the training loop reads one
   integer of shared memory between two batches and makes no system call.
4. The request word only ever grows. The worker remembers the last one that it answered and never
   clears it, so a request that arrives while another is answered can't be lost.
5. A worker on another machine has a page of its own there. A relay beside the supervisor speaks for
   it, as if it were here: its messages and memories come over TCP (`host.streams`), its progress
   about once a second; requests go to it as messages, and its link writes them into its page.
6. Several ranks that see a new request stand still until the page says upon which safe point they
   agreed (`agree`), and answer it there. Each has a page and a connection of its own.

A worker's life on the wire:

    worker                               supervisor
    Hello                        ───►
                                 ◄───    Welcome + [status page, lock, read end of the output pipe]
    Sized                        ───►    what a snapshot will need
    Restored                     ───►    (only when it resumes, at the resume point)
    Snapshot + [memfd]           ───►    on request, and unasked where a stop would otherwise lose
                                         steps (entry of a restart loop, end of an outermost loop)
                                 ◄───    Durable | NotDurable   (only for snapshots that were asked
                                 for)
                                 ◄───    Released                (each snapshot, sooner or later)
                                 ◄───    Apart                   (several ranks, asked to leave:)
                                         they are not at one place, and are asked again
    Short                        ───►    when there is no memory for the next one
    Bye                          ───►    the interpreter ends in good order

and with a worker on another machine:

                                 ◄───    Asked                   a request, for its page
    Seen                         ───►    the page holds it
                                 ◄───    Agreed                  upon a safe point, for its page
                                 ◄───    Kill                    the attempt ends

A command-line tool connects to the same socket, sends one Ask and gets one Answer.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

from ckptd.agree import Position
from ckptd.errors import ProtocolError

PROTOCOL: Final = 4
MESSAGE_BYTES_MAX: Final = 128 * 1024
_SAID_CHARACTERS_MAX: Final = 16 * 1024  # at most six bytes each in JSON: it fits

#: The environment variable by which a worker finds its supervisor's socket.
ENV_SOCKET: Final = "CKPTD_SOCKET"
#: The same for workers on other machines: what `Invitation` says.
ENV_REMOTE: Final = "CKPTD_REMOTE"


class Invitation(msgspec.Struct, frozen=True):
    """How a worker on another machine finds its supervisor, and proves that it is one's worker.

    Attributes:
        secret: of this attempt alone: what is left of an earlier one can't join.
    """

    host: str
    port: int
    secret: bytes

    def text(self) -> str:
        """As it stands in the environment."""
        return f"{self.host},{self.port},{self.secret.hex()}"

    @classmethod
    def read(cls, text: str) -> Invitation:
        """What `text` gave.

        Raises:
            ProtocolError: it is none.
        """
        host, *rest = text.split(",")
        try:
            port, secret = rest
            return cls(host, int(port), bytes.fromhex(secret))
        except ValueError:
            raise ProtocolError(f"{ENV_REMOTE} is not what a supervisor sets") from None


# ------------------------------------------------------------------ worker -> supervisor


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The script called `attach`.

    Attributes:
        pid: the worker's process (maybe a grandchild of the supervisor).
        environment: what decides about bits: torch version, device models, thread counts, CPU
            capability, … Compared with the first attempt's; a difference is said.
        remote: it is on another machine. Said by the relay in between, not by the worker.
    """

    protocol: int
    pid: int
    rank: int
    world_size: int
    environment: dict[str, str]
    remote: bool = False


class Extent(msgspec.Struct, frozen=True):
    """One file of a checkpoint inside the snapshot's memfd (bytes)."""

    name: str
    offset: int
    length: int


class Table(msgspec.Struct, frozen=True):
    """What a snapshot is made of. It lies in the snapshot's memfd: it may be of any length.

    Attributes:
        files: where each of the checkpoint's files is.
        outputs: absolute paths of files opened through `job.open`, to be synced before publishing.
    """

    files: list[Extent]
    outputs: list[str]


class Place(msgspec.Struct, frozen=True):
    """Where a snapshot's table is in its memfd (bytes)."""

    offset: int
    length: int


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """A whole state, in the memfd whose descriptor rides on this message.

    Attributes:
        generation: counts the snapshots of one worker, from 1.
        step: items of innermost loops that are done.
        table: where in the memfd its table is.
        asked: the request word that this answers; 0: sent unasked, to be held in memory.
        cost_s: for how long it held up training, in seconds.
        place: where in the script it was taken, for a person too. Snapshots of several ranks belong
            together if theirs is the same.
    """

    generation: int
    step: int
    table: Place
    asked: int
    cost_s: float = 0.0
    place: str = ""


def places(files: list[Extent]) -> dict[str, slice]:
    """Where each file of a snapshot is in its memfd."""
    return {file.name: slice(file.offset, file.offset + file.length) for file in files}


class Standing(msgspec.Struct, frozen=True, tag=True):
    """Asked within a restart loop: the snapshot sent before it is what there is to save."""

    generation: int
    asked: int


class Sized(msgspec.Struct, frozen=True, tag=True):
    """About how many bytes a snapshot will have, told before the first step."""

    length: int


class Restored(msgspec.Struct, frozen=True, tag=True):
    """The resume point was reached and everything was restored."""

    step: int
    seconds: float


class Notice(msgspec.Struct, frozen=True, tag=True):
    """The worker itself was signalled (a group signal, or a host that signals only steps)."""

    signal: int


class Short(msgspec.Struct, frozen=True, tag=True):
    """There is no memory for another snapshot, unless one is given back (bytes)."""

    needed: int
    available: int


class Said(msgspec.Struct, frozen=True, tag=True):
    """Something a person should read: it goes to stderr and into the journal."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The script can't go on and starting it again would not help (a mismatch, a bad name)."""

    error: str
    text: str


class Seen(msgspec.Struct, frozen=True, tag=True):
    """On another machine: the request stands in the page, and this is where the worker is since."""

    word: int
    position: Position


class Bye(msgspec.Struct, frozen=True, tag=True):
    """The interpreter ends; `finished` is false when it leaves on request or with an error."""

    finished: bool


# ------------------------------------------------------------------ supervisor -> worker


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """You are this job's worker.

    Rides with three descriptors, in this order: the status page (memfd), the job's lock (held as
    long as any copy is open) and the read end of the worker's output pipe (so that nothing breaks
    when the supervisor is killed: the worker then drains it into the log itself). A fourth one is
    the snapshot's to restore, if it is in memory.

    Attributes:
        run: the run's directory, absolute.
        attempt: this attempt's number; publishing is refused once a larger one was claimed.
        checkpoint: the directory to restore, absolute; None at a first start.
        environment: the first attempt's Hello.environment; None at a first start.
        keep: how many checkpoints to keep, for a worker that outlives its supervisor.
        generation: the last snapshot's; the worker counts on from there.
        memory: where the table of the snapshot to restore is in its memfd; None: `checkpoint` is to
            be restored.
    """

    name: str
    run: str
    attempt: int
    checkpoint: str | None
    environment: dict[str, str] | None
    keep: int
    generation: int = 0
    memory: Place | None = None


class TurnedAway(msgspec.Struct, frozen=True, tag=True):
    """You are not this job's worker, and why."""

    why: str


class Durable(msgspec.Struct, frozen=True, tag=True):
    """The snapshot is on disk and synced. This is the receipt; it is never taken back."""

    generation: int


class Released(msgspec.Struct, frozen=True, tag=True):
    """The supervisor has let go of this snapshot's memory: the worker may use it again.

    May get lost, when the worker does not read: then the memory is not used again.
    """

    generation: int


class NotDurable(msgspec.Struct, frozen=True, tag=True):
    """The snapshot could not be made durable, and why."""

    generation: int
    why: str


class Apart(msgspec.Struct, frozen=True, tag=True):
    """Other ranks answered this request to leave elsewhere: go on, it is asked again."""

    generation: int


class Asked(msgspec.Struct, frozen=True, tag=True):
    """To another machine: the request word that is to stand in the page."""

    word: int


class Agreed(msgspec.Struct, frozen=True, tag=True):
    """To another machine: upon what was agreed for a request; None: go on, it is asked again."""

    word: int
    target: Position | None


class Kill(msgspec.Struct, frozen=True, tag=True):
    """To another machine: the process is to end at once. Nobody here can send it a signal."""


# ------------------------------------------------------------------ command line <-> supervisor


class Ask(msgspec.Struct, frozen=True, tag=True):
    """A command-line tool's question: "status", "stop" or "checkpoint".

    "stop" and "checkpoint" are answered when what they asked for is done (or has failed).
    """

    what: str


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The reply to an Ask.

    Attributes:
        ok: whether what was asked for happened.
        text: one line for a person.
        facts: for "status": what the supervisor knows, by name.
    """

    ok: bool
    text: str
    facts: dict[str, str | int | float | None]


ToSupervisor = (
    Hello
    | Sized
    | Snapshot
    | Standing
    | Restored
    | Notice
    | Short
    | Said
    | Refused
    | Seen
    | Bye
    | Ask
)
ToWorker = (
    Welcome | TurnedAway | Durable | NotDurable | Apart | Released | Asked | Agreed | Kill | Answer
)

_encoder = msgspec.json.Encoder()
_to_supervisor = msgspec.json.Decoder(ToSupervisor)
_to_worker = msgspec.json.Decoder(ToWorker)
_table = msgspec.json.Decoder(Table)


def encode(message: ToSupervisor | ToWorker) -> bytes:
    """The packet for a message; a text for a person is cut to what fits into one.

    Raises:
        ProtocolError: the packet would be larger than MESSAGE_BYTES_MAX.
    """
    packet = _encoder.encode(message)
    if len(packet) > MESSAGE_BYTES_MAX and isinstance(message, Said | Refused):
        text = f"{message.text[:_SAID_CHARACTERS_MAX]} …"
        packet = _encoder.encode(msgspec.structs.replace(message, text=text))
    if len(packet) > MESSAGE_BYTES_MAX:
        raise ProtocolError(
            f"a {type(message).__name__} message of {len(packet)} bytes; "
            f"at most {MESSAGE_BYTES_MAX} fit into one packet"
        )
    return packet


def decode_for_supervisor(packet: bytes) -> ToSupervisor:
    """A worker's (or a command-line tool's) message.

    Raises:
        ProtocolError: the bytes are no such message.
    """
    try:
        message: ToSupervisor = _to_supervisor.decode(packet)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a message for a supervisor: {error}: {packet[:80]!r}") from error
    return message


def decode_for_worker(packet: bytes) -> ToWorker:
    """A supervisor's message.

    Raises:
        ProtocolError: the bytes are no such message.
    """
    try:
        message: ToWorker = _to_worker.decode(packet)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a message for a worker: {error}: {packet[:80]!r}") from error
    return message


def encode_table(table: Table) -> bytes:
    """A table as it lies in a memfd."""
    return _encoder.encode(table)


def table_in(memory: memoryview, place: Place) -> Table:
    """The table in a snapshot's memory.

    Raises:
        ProtocolError: it is none, or speaks of more bytes than are there.
    """
    _check_place("its table", place.offset, place.length, len(memory))
    try:
        table = _table.decode(memory[place.offset : place.offset + place.length])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a snapshot whose table can't be read: {error}") from error
    for file in table.files:
        _check_place(repr(file.name), file.offset, file.length, len(memory))
    if len(places(table.files)) != len(table.files):
        raise ProtocolError("a snapshot whose table has two files of one name")
    return table


def _check_place(what: str, offset: int, length: int, end: int) -> None:
    if offset < 0 or length < 0 or offset + length > end:
        raise ProtocolError(
            f"a snapshot of {end} bytes in which {what} is said to be {length} bytes at {offset}"
        )


# ------------------------------------------------------------------ the status page


class Request(IntEnum):
    """What the supervisor wants at the next safe point (the low bits of the request word)."""

    NOTHING = 0
    FLUSH = 1  # hand over a snapshot and go on
    LEAVE = 2  # hand over a snapshot, wait for the receipt, exit with 75
    ORPHANED = 3  # set by the worker itself: the supervisor is gone, publish and exit with 75


_REQUEST_BITS = 2


def request_word(serial: int, request: Request) -> int:
    """The request word of the `serial`-th request (serial counts from 1)."""
    return serial << _REQUEST_BITS | request


def request_of(word: int) -> Request:
    """What a request word asks for."""
    return Request(word & (1 << _REQUEST_BITS) - 1)


def serial_of(word: int) -> int:
    """The how-manieth request a request word is."""
    return word >> _REQUEST_BITS


PAGE_BYTES: Final = 8192
_TEXT_AT = 4096
_TEXT_BYTES_MAX = PAGE_BYTES - _TEXT_AT

#: Indices of the page's 64-bit words.
WORD_REQUEST: Final = 0  # supervisor -> worker
WORD_STEP: Final = 1  # worker -> supervisor: items of innermost loops that are done
WORD_DEPTH: Final = 2  # how many loops are open
WORD_TEXT_BYTES: Final = 3  # length of the JSON text; 0 while it is being changed
WORD_AGREED: Final = 4  # supervisor -> worker, several ranks: the request that was agreed upon
WORD_LEVELS: Final = 5  # of the position that was agreed upon; 0: go on, it is asked again
#: Per open loop: items done, length (0: unknown), a restart loop (0 or 1), and which loop of the
#: item around it.
WORD_LOOPS: Final = 8
LOOP_WORDS: Final = 4
LOOPS_MAX: Final = 16
WORD_TARGET: Final = WORD_LOOPS + LOOP_WORDS * LOOPS_MAX  # per level: which loop, items done


class Loop(msgspec.Struct, frozen=True):
    """How far one open loop is; `length` 0 means unknown."""

    done: int
    length: int
    restart: bool


class StatusPage:
    """A page of shared memory: requests in, progress out.

    `words` is the page as unsigned 64-bit integers; the training loop uses it directly, since a
    method call per batch would cost more than what it does. Words are written whole by the CPU.

    Args:
        memory: a writable buffer of PAGE_BYTES bytes, zeroed at first.
    """

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory.cast("B")
        self.words = self._bytes[:_TEXT_AT].cast("Q")

    def close(self) -> None:
        """Let go of the buffer, so that its mapping can be closed."""
        self.words.release()
        self._bytes.release()

    def loops(self) -> list[Loop]:
        """The open loops, outermost first."""
        depth = min(self.words[WORD_DEPTH], LOOPS_MAX)
        at = [WORD_LOOPS + LOOP_WORDS * level for level in range(depth)]
        return [Loop(self.words[i], self.words[i + 1], bool(self.words[i + 2])) for i in at]

    def position(self) -> Position:
        """Where the worker is; the same twice, since it may move while it is read."""
        before: Position | None = None
        while before != (now := self._position()):
            before = now
        return now

    def _position(self) -> Position:
        depth = min(self.words[WORD_DEPTH], LOOPS_MAX)
        at = [WORD_LOOPS + LOOP_WORDS * level for level in range(depth)]
        return tuple((self.words[i + 3], self.words[i]) for i in at)

    def agree(self, word: int, target: Position | None) -> None:
        """Say upon what was agreed for a request; None: to go on, it will be asked again."""
        levels = () if target is None else target
        for level, (ordinal, done) in enumerate(levels):
            self.words[WORD_TARGET + 2 * level] = ordinal
            self.words[WORD_TARGET + 2 * level + 1] = done
        self.words[WORD_LEVELS] = len(levels)
        self.words[WORD_AGREED] = word  # last: who reads it, reads the rest

    def agreed(self, word: int) -> Position | None:
        """Upon what was agreed for a request; empty: to go on. None: it is not known yet."""
        if self.words[WORD_AGREED] != word:
            return None
        at = [WORD_TARGET + 2 * level for level in range(self.words[WORD_LEVELS])]
        return tuple((self.words[i], self.words[i + 1]) for i in at)

    def progress(self) -> bytes:
        """The page as it is now, for `show`."""
        return bytes(self._bytes)

    def show(self, progress: bytes) -> None:
        """Show what another page shows of a worker's progress; requests stay what they are.

        Raises:
            ProtocolError: it is no page.
        """
        if len(progress) != PAGE_BYTES:
            raise ProtocolError(f"a status page of {len(progress)} bytes")
        other = memoryview(progress)[:_TEXT_AT].cast("Q")
        self.words[WORD_TEXT_BYTES] = 0
        self._bytes[_TEXT_AT:] = progress[_TEXT_AT:]
        self.words[WORD_LOOPS:WORD_TARGET] = other[WORD_LOOPS:WORD_TARGET]
        for word in (WORD_DEPTH, WORD_STEP, WORD_TEXT_BYTES):
            self.words[word] = other[word]

    def write_values(self, values: dict[str, float | int | str]) -> None:
        """Show the last logged values (dropped when they don't fit on the page)."""
        text = _encoder.encode(values)
        if len(text) > _TEXT_BYTES_MAX:
            return
        self.words[WORD_TEXT_BYTES] = 0
        self._bytes[_TEXT_AT : _TEXT_AT + len(text)] = text
        self.words[WORD_TEXT_BYTES] = len(text)

    def values(self) -> dict[str, float | int | str]:
        """The last logged values; empty when there are none or they are just being changed."""
        length = min(self.words[WORD_TEXT_BYTES], _TEXT_BYTES_MAX)
        try:
            return msgspec.json.decode(
                bytes(self._bytes[_TEXT_AT : _TEXT_AT + length]), type=dict[str, float | int | str]
            )
        except msgspec.DecodeError:
            return {}
