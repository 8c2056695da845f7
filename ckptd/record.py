"""What a drill has the worker write down, and what it has it do: the files of one drilled run.

Pure: bytes in, values out. `ckptd drill` (in `drill/`) plans and reads; the worker (in
`worker/drilled`) carries out and writes. A drilled run's directory:

    plan.json     the strikes: at which safe point which signal (`Strike`)
    done-N        strike N was carried out
    marks.jsonl   one `Mark` for every safe point that the script came by, in order, and one at the
                  end; of all processes one after another
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

#: The environment variable that names the drilled run's directory to the worker.
ENV_DRILL: Final = "CKPTD_DRILL"
PLAN: Final = "plan.json"
MARKS: Final = "marks.jsonl"
#: The key of the mark at the end of the script.
END: Final = "end of the script"

#: What a strike can do, beside the signals that go to the supervisor by their names.
CHECKPOINT: Final = "CHECKPOINT"  # have a checkpoint made and go on
KILL: Final = "KILL"  # SIGKILL to the worker
ORPHAN: Final = "ORPHAN"  # SIGKILL to the supervisor
#: The kind of a variable that has a tracked object's name and is another object by now.
REBOUND: Final = "rebound"

SIGNALS: Final = ("TERM", "USR1", "HUP", "INT")


class Strike(msgspec.Struct, frozen=True):
    """One interruption.

    Attributes:
        key: the safe point.
        how: one of `SIGNALS`, `KILL`, `ORPHAN` or `CHECKPOINT`.
        step: items of innermost loops that are done there; for people.
    """

    key: str
    how: str
    step: int


class Mark(msgspec.Struct, frozen=True):
    """One safe point as one process came by it.

    Digests are texts: of a short plain value its `repr`, of everything else a hash of all its bits.

    Attributes:
        key: which safe point: the same in every run of the script.
        step: items of innermost loops that are done.
        place: for people: "train.py:31, item 12 of 100".
        first: whether it is the first one of its process.
        strikable: whether a request would be answered here.
        changed: component ("object:`model`", "vars:…", "stream:…", "loader:…", "settings:…") ->
            digest, of those that changed since the process's mark before.
        items: loop -> digest of the item that it handed out since the mark before.
        logged: name -> digest of the values that were logged since the mark before.
        variables: the script's own variables that it may still read -> digest; those that changed.
        gone: variables that were there at the mark before and are not any more.
        kinds: variable -> what it is, where it is no plain value: "AveragedModel".
        said: what ckptd told the user since the mark before.
        outputs: absolute paths of the files opened through `job.open`; at the end only.
    """

    key: str
    step: int
    place: str
    first: bool
    strikable: bool
    changed: dict[str, str]
    items: dict[str, str]
    logged: dict[str, str]
    variables: dict[str, str]
    gone: list[str]
    kinds: dict[str, str]
    said: list[str] = []
    outputs: list[str] = []


class Seen(msgspec.Struct, frozen=True):
    """A mark with everything that held there, not only what changed."""

    mark: Mark
    components: dict[str, str]
    variables: dict[str, str]


_encoder = msgspec.json.Encoder()
_mark = msgspec.json.Decoder(Mark)
_plan = msgspec.json.Decoder(list[Strike])


def encode(mark: Mark) -> bytes:
    """One line of `marks.jsonl`."""
    return _encoder.encode(mark) + b"\n"


def encode_plan(strikes: list[Strike]) -> bytes:
    """The content of `plan.json`."""
    return _encoder.encode(strikes)


def decode_plan(content: bytes) -> list[Strike]:
    """What `encode_plan` was given."""
    return _plan.decode(content)


def expand(lines: Iterable[bytes]) -> list[Seen]:
    """All marks of a run, in order. A last line that was cut off by a kill is left out."""
    seen: list[Seen] = []
    components: dict[str, str] = {}
    variables: dict[str, str] = {}
    for line in lines:
        if not line.endswith(b"\n"):
            break
        mark = _mark.decode(line)
        if mark.first:
            components, variables = {}, {}
        components = {**components, **mark.changed}
        variables = {name: v for name, v in variables.items() if name not in mark.gone}
        variables |= mark.variables
        seen.append(Seen(mark, components, variables))
    return seen
