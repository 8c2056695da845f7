"""A drill: twice undisturbed, once interrupted, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import msgspec

from ckptd.drill import compare, plan, words
from ckptd.drill.compare import Difference, FileDifference, Lost
from ckptd.drill.runs import DrilledRun, Finished, need_marks
from ckptd.errors import CkptdError
from ckptd.record import Strike

#: Tells a person: of a run's name and its expected safe points, a context in which the number of
#: safe points done is told.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


_FIRST: Final = "undisturbed"


class Verdict(msgspec.Struct, frozen=True):
    """What came out, as `--json` writes it.

    Attributes:
        equal: whether nothing differs.
        deterministic: whether two uninterrupted runs are the same.
        steps: how many steps the script has.
        safe_points: how many safe points were compared.
        strikes: the interruptions.
        codes: exit codes of the uninterrupted and of the interrupted run.
        components: component -> None where it was always equal, else the first step at which it
            differs.
        first: the first difference.
        lost: variables of the script that an interruption changed.
        files: files that differ.
        findings: all of it in words.
    """

    equal: bool
    deterministic: bool
    steps: int
    safe_points: int
    strikes: list[Strike]
    codes: list[int]
    components: dict[str, int | None]
    first: Difference | None
    lost: list[Lost]
    files: list[FileDifference]
    findings: list[str]


class Drill:
    """One drill.

    Args:
        place: an empty directory for the runs.
        argv: the command.
        options: for `ckptd launch`.
        files: whether to compare files that the script wrote without `job.open`, too.
        progress: shows how far a run is.

    Attributes:
        linked: what of the working directory is not copied for each run but linked.
    """

    def __init__(
        self,
        place: Path,
        argv: Sequence[str],
        options: Sequence[str],
        *,
        files: bool,
        progress: Progress,
    ) -> None:
        self._place, self._argv, self._options = place, argv, list(options)
        self._files, self._progress = files, progress
        self._points = 0  # safe points of the first run: what the others are measured by
        self._prepared = self._prepare(_FIRST, ())
        self.linked = self._prepared.linked

    def run(self, *, count: int, kinds: Sequence[str], seed: int, steps: Sequence[int]) -> Verdict:
        """Carry it out.

        Args:
            count: how many interruptions.
            kinds: what to interrupt with, in turn.
            seed: decides about the moments.
            steps: the steps at which to interrupt; none: at random.

        Raises:
            CkptdError: the script fails undisturbed, or comes by no safe point.
            UsageError: it has no such steps.
        """
        straight = self._straight(_FIRST)
        self._points = len(straight.seen)
        strikes = plan.choose(straight.seen, count=count, kinds=kinds, seed=seed, steps=steps)
        again = self._straight("undisturbed again")
        idle = compare.idle_streams(straight.seen, again.seen)
        straight, again = _without(straight, idle), _without(again, idle)
        if not self._same(straight, again):
            return self._not_deterministic(straight, again)
        interrupted = _without(self._run("interrupted", strikes), idle)
        return self._judge(straight, again, interrupted, strikes)

    def _straight(self, name: str, options: Sequence[str] = ()) -> Finished:
        finished = self._run(name, [], options)
        if finished.code != 0:
            raise CkptdError(
                f"the script fails without any interruption (`ckptd launch` exits with "
                f"{finished.code}); it printed:\n{finished.last_lines()}"
            )
        need_marks(finished)
        return finished

    def _run(self, name: str, strikes: Sequence[Strike], options: Sequence[str] = ()) -> Finished:
        prepared = self._prepared if name == _FIRST else self._prepare(name, options)
        with self._progress(name, self._points) as told:
            return prepared.run(strikes, told)

    def _prepare(self, name: str, options: Sequence[str]) -> DrilledRun:
        place = self._place / name.replace(" ", "-")
        return DrilledRun(place, Path.cwd(), self._argv, [*self._options, *options])

    def _same(self, straight: Finished, again: Finished) -> bool:
        return (
            compare.first_difference(straight.seen, again.seen) is None
            and compare.first_difference(again.seen, straight.seen) is None
            and not self._outputs_differing(straight, again)
        )

    def _outputs_differing(self, one: Finished, other: Finished) -> list[FileDifference]:
        """Files opened through `job.open` that differ."""
        names = {*one.outputs, *other.outputs}
        return compare.files_differing(
            {path: content for path, content in one.files.items() if path in names},
            {path: content for path, content in other.files.items() if path in names},
        )

    def _not_deterministic(self, straight: Finished, again: Finished) -> Verdict:
        first = compare.first_difference(straight.seen, again.seen)
        first = first or compare.first_difference(again.seen, straight.seen)
        files = self._outputs_differing(straight, again)
        findings = ["two undisturbed runs differ: the script itself is not deterministic"]
        findings += [] if first is None else [words.at_first(first)]
        findings += [f"the file `{one.path}` differs between them" for one in files]
        if "--fixed-addresses" not in self._options and self._fixed_addresses_help():
            findings.append(words.ADDRESSES)
        elif first is not None:
            findings += words.why_not_deterministic(first)
        return Verdict(
            equal=False,
            deterministic=False,
            steps=straight.seen[-1].mark.step,
            safe_points=len(straight.seen),
            strikes=[],
            codes=[straight.code, again.code],
            components=_components(straight, again),
            first=first,
            lost=[],
            files=files,
            findings=findings,
        )

    def _fixed_addresses_help(self) -> bool:
        try:
            one, other = (
                self._straight(f"fixed addresses {n}", ["--fixed-addresses"]) for n in (1, 2)
            )
        except CkptdError:
            return False  # not allowed here; what differs has been found without it
        idle = compare.idle_streams(one.seen, other.seen)
        return self._same(_without(one, idle), _without(other, idle))

    def _judge(
        self, straight: Finished, again: Finished, interrupted: Finished, strikes: list[Strike]
    ) -> Verdict:
        first = compare.first_difference(straight.seen, interrupted.seen)
        unstable = compare.unstable_variables(straight.seen, again.seen)
        lost = compare.lost_variables(straight.seen, interrupted.seen, unstable)
        files = self._outputs_differing(straight, interrupted)
        if self._files:
            files = _comparable(straight, again, interrupted)
        # Of a variable of a function that runs it is known that it may be read. A global or an
        # attribute that came right again may have been a cache.
        grave = [one for one in lost if not one.recovered or _is_surely_read(one.name)]
        findings = [] if first is None else [words.at_first(first)]
        findings += [words.about_lost(one) for one in lost]
        if first is not None and not lost:
            findings += words.without_lost(first, compare.generators(interrupted.seen))
        findings += [words.about_file(one, interrupted.outputs) for one in files]
        if interrupted.code != straight.code:
            findings.append(words.about_failure(interrupted.code, interrupted.failure()))
        findings += compare.said(interrupted.seen)
        return Verdict(
            equal=first is None and not grave and not files and interrupted.code == straight.code,
            deterministic=True,
            steps=straight.seen[-1].mark.step,
            safe_points=len(straight.seen),
            strikes=strikes,
            codes=[straight.code, interrupted.code],
            components=_components(straight, interrupted),
            first=first,
            lost=lost,
            files=files,
            findings=findings,
        )


def _is_surely_read(name: str) -> bool:
    _, variable, where = name.split("`")
    return "." not in variable and (where == "" or where.endswith("()"))


def _components(one: Finished, other: Finished) -> dict[str, int | None]:
    differing = compare.components_differing(one.seen, other.seen)
    names = compare.names_seen(one.seen) | differing.keys()
    return {name: differing.get(name) for name in sorted(names)}


def _without(run: Finished, names: set[str]) -> Finished:
    return msgspec.structs.replace(run, seen=compare.without(run.seen, names))


def _comparable(one: Finished, again: Finished, other: Finished) -> list[FileDifference]:
    """Files that differ in the interrupted run, of those that two undisturbed runs write alike.

    Files of another name in each run (after the time, or a process id) can't be told apart from
    missing ones, so what only the interrupted run wrote counts only if `job.open` opened it.
    """
    alike = {
        path: content for path, content in one.files.items() if again.files.get(path) == content
    }
    theirs = {p: c for p, c in other.files.items() if p in alike or p in other.outputs}
    return compare.files_differing(alike, theirs)
