"""Two recorded runs, compared bit for bit: the first difference, and what it comes from. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ckptd import record
from ckptd.record import Mark, Seen

_GENERATORS = ("Generator", "Random", "RandomState")

#: What is not there is shown so.
ABSENT = "not there"


class Difference(msgspec.Struct, frozen=True):
    """The first safe point at which two runs are not the same.

    Attributes:
        step: items of innermost loops that are done.
        place: for people: "train.py:31, 12 of 100 items done".
        names: what differs, by "kind:name".
        equal: components that are still equal there.
        variables: variables of the script that differ there.
        other_way: the other run came by a safe point that the first one does not have.
    """

    step: int
    place: str
    names: list[str]
    equal: list[str]
    variables: list[str]
    other_way: bool = False


class Lost(msgspec.Struct, frozen=True):
    """A variable of the script that was another one after a resume.

    Attributes:
        name: "`best_acc` in main()".
        kind: its type's name, `record.REBOUND`, or "" for a plain value.
        before: its digest in the uninterrupted run.
        after: its digest after the resume, or `ABSENT`.
        step: the step at which the job was resumed.
        place: the same for people.
        recovered: it came to be the same again later.
    """

    name: str
    kind: str
    before: str
    after: str
    step: int
    place: str
    recovered: bool


class FileDifference(msgspec.Struct, frozen=True):
    """A file that the two runs wrote differently; lengths in bytes, None where there is none."""

    path: str
    before: int | None
    after: int | None


def by_key(seen: Sequence[Seen]) -> dict[str, Seen]:
    """The marks by their safe point."""
    return {one.mark.key: one for one in seen}


def unstable_variables(first: Sequence[Seen], second: Sequence[Seen]) -> set[str]:
    """Variables that differ between two uninterrupted runs: times, process ids, addresses."""
    others = by_key(second)
    found = set()
    for one in first:
        other = others.get(one.mark.key)
        if other is not None:
            found |= _differing(one.variables, other.variables, missing=True)
    return found


def idle_streams(*runs: Sequence[Seen]) -> set[str]:
    """Random streams that no run draws from: a script need not seed what it doesn't use."""
    values: dict[str, set[str]] = {}
    idle: set[str] = set()
    for seen in runs:
        values.clear()
        for one in seen:
            for name, text in one.components.items():
                if name.startswith("stream:"):
                    values.setdefault(name, set()).add(text)
        here = {name for name, texts in values.items() if len(texts) == 1}
        idle = here if seen is runs[0] else idle & here
    return idle


def without(seen: Sequence[Seen], names: set[str]) -> list[Seen]:
    """The marks without some components."""
    return [
        msgspec.structs.replace(
            one,
            mark=msgspec.structs.replace(one.mark, changed=_leave_out(one.mark.changed, names)),
            components=_leave_out(one.components, names),
        )
        for one in seen
    ]


def first_difference(reference: Sequence[Seen], other: Sequence[Seen]) -> Difference | None:
    """Where a run first differs from the reference; None: nowhere.

    A safe point that the other run came by twice (it was killed and did a part again) has to be
    the same both times.
    """
    known = by_key(reference)
    order = {one.mark.key: i for i, one in enumerate(reference)}
    found: tuple[int, Difference] | None = None
    for one in other:
        expected = known.get(one.mark.key)
        if expected is None:
            if found is None:
                way = Difference(one.mark.step, one.mark.place, [], [], [], other_way=True)
                found = (len(order), way)
            continue
        names = sorted(_differing(expected.components, one.components))
        if one.mark.key == record.END:
            names += [n for n in expected.components if _is_missing_object(n, one.components)]
        names += sorted(f"items:{n}" for n in _differing(expected.mark.items, one.mark.items))
        names += sorted(f"logged:{n}" for n in _differing(expected.mark.logged, one.mark.logged))
        index = order[one.mark.key]
        if names and (found is None or index < found[0]):
            equal = sorted((expected.components.keys() & one.components.keys()) - set(names))
            varied = sorted(_differing(expected.variables, one.variables, missing=True))
            found = index, Difference(one.mark.step, one.mark.place, names, equal, varied)
    return None if found is None else found[1]


def components_differing(reference: Sequence[Seen], other: Sequence[Seen]) -> dict[str, int]:
    """Component -> the first step at which it differs; also "items:…" and "logged:…"."""
    known = by_key(reference)
    found: dict[str, int] = {}
    for one in other:
        expected = known.get(one.mark.key)
        if expected is None:
            continue
        names = _differing(expected.components, one.components)
        names |= {f"items:{n}" for n in _differing(expected.mark.items, one.mark.items)}
        names |= {f"logged:{n}" for n in _differing(expected.mark.logged, one.mark.logged)}
        for name in names:
            found[name] = min(found.get(name, one.mark.step), one.mark.step)
    return found


def names_seen(seen: Sequence[Seen]) -> set[str]:
    """Every component, loop and logged value of a run, as in `components_differing`."""
    names: set[str] = set()
    for one in seen:
        names.update(one.mark.changed)
        names.update(f"items:{name}" for name in one.mark.items)
        names.update(f"logged:{name}" for name in one.mark.logged)
    return names


def lost_variables(
    reference: Sequence[Seen], resumed: Sequence[Seen], unstable: set[str]
) -> list[Lost]:
    """Variables that a resumed process may read, and that were not what they had been.

    One that is the same again at the next safe point was only a value within one item, and nothing
    is lost.
    """
    known = by_key(reference)
    found: dict[str, Lost] = {}
    for index, one in enumerate(resumed):
        expected = known.get(one.mark.key)
        if index == 0 or not one.mark.first or expected is None:
            continue
        process = [one, *_rest_of_process(resumed, index)]
        for name in sorted(_differing(expected.variables, one.variables, missing=True)):
            if name in unstable or name in found or name not in expected.variables:
                continue
            later = [
                known[m.mark.key].variables[name] == m.variables.get(name)
                for m in process[1:]
                if m.mark.key in known and name in known[m.mark.key].variables
            ]
            if later[:1] == [True]:
                continue
            found[name] = Lost(
                name,
                _kind(reference, name, expected.mark),
                expected.variables[name],
                one.variables.get(name, ABSENT),
                one.mark.step,
                one.mark.place,
                recovered=later[-1:] == [True],
            )
    return list(found.values())


def generators(seen: Sequence[Seen]) -> list[str]:
    """The script's variables that are random generators and not carried."""
    kinds = {name: kind for one in seen for name, kind in one.mark.kinds.items()}
    return [name for name, kind in kinds.items() if kind in _GENERATORS]


def said(seen: Sequence[Seen]) -> list[str]:
    """What ckptd told the user in a run, each once."""
    return list(dict.fromkeys(text for one in seen for text in one.mark.said))


def files_differing(
    before: Mapping[str, tuple[int, str]], after: Mapping[str, tuple[int, str]]
) -> list[FileDifference]:
    """Files that differ between two runs; each is path -> (bytes, sum)."""
    return [
        FileDifference(
            path, *(files[path][0] if path in files else None for files in (before, after))
        )
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def _leave_out(texts: Mapping[str, str], names: set[str]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if name not in names}


def _is_missing_object(name: str, components: Mapping[str, str]) -> bool:
    """An object that is tracked late may be missing for a while, but not at the end."""
    return name.startswith(("object:", "vars:")) and name not in components


def _kind(reference: Sequence[Seen], name: str, until: Mark) -> str:
    kind = ""
    for one in reference:
        kind = one.mark.kinds.get(name, kind)
        if one.mark.key == until.key:
            break
    return kind


def _rest_of_process(seen: Sequence[Seen], index: int) -> list[Seen]:
    rest = []
    for one in seen[index + 1 :]:
        if one.mark.first:
            break
        rest.append(one)
    return rest


def _differing(
    first: Mapping[str, str], second: Mapping[str, str], *, missing: bool = False
) -> set[str]:
    """The names whose digests differ; `missing`: also those that one side has not."""
    names = first.keys() | second.keys() if missing else first.keys() & second.keys()
    return {name for name in names if first.get(name) != second.get(name)}
