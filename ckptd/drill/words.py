"""A drill's findings in words: what, where, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ckptd import record
from ckptd.drill.compare import Difference, FileDifference, Lost

#: When fixed memory addresses make a script deterministic.
ADDRESSES: Final = (
    "with --fixed-addresses two runs are the same: something is ordered by memory addresses, such "
    "as a set of objects. Use a list or dict.fromkeys in its place, or start the job with "
    "`ckptd launch --fixed-addresses`"
)
#: Causes before effects: what is drawn, what is handed out, then what is made of it.
_ORDER: Final = ("settings", "loader", "stream", "items", "vars", "logged", "object")
_NAMES_MAX: Final = 4


def described(component: str) -> str:
    """A component's name as a person reads it."""
    kind, _, text = component.partition(":")
    words = {"items": f"the item of the loop at {text}", "logged": f"the logged `{text}`"}
    return words.get(kind, text)


def at_first(first: Difference) -> str:
    """Where two runs first differ, and in what."""
    where = f"step {first.step} ({first.place})"
    if first.other_way:
        return f"{where}: the interrupted run took another way from here on"
    ordered = sorted(first.names, key=lambda name: _ORDER.index(name.partition(":")[0]))
    shown = [described(name) for name in ordered]
    more = f" and {len(shown) - _NAMES_MAX} more" if len(shown) > _NAMES_MAX else ""
    text = f"{where}: {', '.join(shown[:_NAMES_MAX])}{more} differ{'s' * (len(shown) == 1)}"
    equal = [name.partition(":")[2] for name in first.equal if name.startswith("object:")]
    equal = [name for name in equal if "(" not in name]
    return text + (f", {', '.join(equal[:_NAMES_MAX])} still equal" if equal else "")


def why_not_deterministic(first: Difference) -> list[str]:
    """What two undisturbed runs differ by at the beginning."""
    findings = []
    streams = [described(name) for name in first.names if name.startswith("stream:")]
    if streams:
        findings.append(
            f"{', '.join(streams)}: seeded by the time, or not at all. Seed before anything is "
            "built: ckptd.seed_everything(1)"
        )
    elif first.step == 0:
        findings.append(
            "the random streams are equal: look for the time, a process id, hash() or id() of an "
            "object, the order of a directory's files, or a library that seeds itself"
        )
    else:
        findings.append(
            "if no random stream differs either, an operation is not deterministic: "
            "ckptd.seed_everything(1) asks torch for deterministic ones"
        )
    if first.variables:
        findings.append(f"variables that differ there: {', '.join(first.variables[:_NAMES_MAX])}")
    return findings


def about_lost(one: Lost) -> str:
    """What became of a variable, and how to keep it."""
    name, where = one.name.split("`")[1:]
    if one.kind == record.REBOUND:
        return (
            f"`{name}`{where} is another object than the one that was tracked under this name: it "
            "was assigned anew. Change the tracked object in place"
        )
    leaf = name.rpartition(".")[2]
    if one.kind and one.before.startswith("#"):
        text = f"`{name}`{where} ({one.kind}) was not what it had been"
        fix = f"track it: ckptd.attach({leaf}={name})"
    else:
        text = f"`{name}`{where} was {_value(one.before)}, is {_value(one.after)}"
        fix = f"track it with job.vars: job.vars.{leaf}"
    later = " (it was set again later)" if one.recovered else ""
    return f"{text} after resuming at step {one.step} ({one.place}): {fix}{later}"


def without_lost(first: Difference, generators: Sequence[str]) -> list[str]:
    """A cause that lies outside of the script's variables.

    Args:
        first: where the runs first differ.
        generators: the script's variables that are random generators and not carried.
    """
    kinds = {name.partition(":")[0] for name in first.names}
    if "items" not in kinds or kinds & {"stream", "loader"}:
        return []
    text = (
        "the items differ though every carried stream is equal: what makes them draws from a "
        "generator that is not carried, or depends on the time or a process id"
    )
    if generators:
        text += (
            f". Not carried: {', '.join(generators)}. If the loader's workers draw from it, name "
            "it with ckptd.track(…) where it is defined"
        )
    return [text]


def about_file(one: FileDifference, outputs: Sequence[str]) -> str:
    """A file that differs.

    Args:
        one: the file.
        outputs: the files that were opened through `job.open`.
    """
    before, after = ("missing" if n is None else f"{n} bytes" for n in (one.before, one.after))
    text = f"the file `{one.path}` differs: {before} undisturbed, {after} interrupted"
    if one.path not in outputs and (one.after or 0) > (one.before or 0):
        text += (
            ". What was done again after an interruption stands there twice: open it with "
            f"job.open({one.path!r}), which cuts it back to the checkpoint"
        )
    return text


def about_failure(code: int, lines: str) -> str:
    """The interrupted run failed, and the undisturbed one did not."""
    text = f"the interrupted run ended with exit code {code}:\n{lines}"
    if "NameError" in lines or "UnboundLocalError" in lines:
        text += (
            "\nA variable that is set only within a loop is not there after a resume at its end: "
            "keep it in job.vars"
        )
    return text


def _value(digest: str) -> str:
    return "another value" if digest.startswith("#") else digest
