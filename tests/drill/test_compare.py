"""The first difference, the lost variables and the moments, on made-up records."""

from __future__ import annotations

import pytest

from ckptd import record
from ckptd.drill import compare, plan, words
from ckptd.drill.drill import _is_surely_read
from ckptd.errors import UsageError
from ckptd.record import Mark, Seen


def mark(key: str, step: int, components=None, *, variables=None, first=False, **more) -> Mark:
    empty: dict = {"items": {}, "logged": {}, "gone": [], "kinds": {}, "strikable": True}
    return Mark(
        key=key,
        step=step,
        place=key,
        first=first,
        changed=components or {},
        variables=variables or {},
        **{**empty, **more},
    )


def seen(*marks: Mark) -> list[Seen]:
    return record.expand([record.encode(one) for one in marks])


def straight(**of_last) -> list[Seen]:
    """Two epochs of three items with an object that changes with each."""
    marks = [mark("0:0 entry", 0, {"object:`model`": "0"}, first=True)]
    step = 0
    for epoch in range(2):
        marks.append(mark(f"0:{epoch} item", step))
        for item in range(3):
            marks.append(mark(f"0:{epoch}/0:{item} item", step))
            step += 1
            marks[-1] = mark(f"0:{epoch}/0:{item} item", step - 1, {"object:`model`": str(step)})
        marks.append(mark(f"0:{epoch}/0:3 end", step))
    marks.append(mark(record.END, step, **of_last))
    return seen(*marks)


def test_equal() -> None:
    """A run does not differ from itself."""
    assert compare.first_difference(straight(), straight()) is None
    assert compare.components_differing(straight(), straight()) == {}


def test_the_first_difference_is_that_of_the_script() -> None:
    """Of two differences the one that comes first in the script counts, not in time."""
    reference = seen(
        mark("a", 1, {"object:`m`": "1", "stream:s": "1"}, first=True),
        mark("b", 2, {"object:`m`": "2"}),
        mark("c", 3, {"object:`m`": "3"}),
    )
    other = seen(
        mark("a", 1, {"object:`m`": "1", "stream:s": "1"}, first=True),
        mark("c", 3, {"object:`m`": "x"}),
        mark("b", 2, {"object:`m`": "y"}, first=True),
    )
    first = compare.first_difference(reference, other)
    assert first is not None
    assert (first.step, first.names) == (2, ["object:`m`"])
    assert compare.components_differing(reference, other) == {"object:`m`": 2}


def test_another_way() -> None:
    """A safe point that the reference doesn't have is a difference."""
    first = compare.first_difference(seen(mark("a", 1)), seen(mark("b", 1)))
    assert first is not None
    assert first.other_way
    assert "another way" in words.at_first(first)


def test_missing_at_the_end() -> None:
    """An object may be tracked late, but not be missing at the end."""
    reference = seen(mark("a", 1, {"object:`m`": "1"}, first=True), mark(record.END, 1))
    other = seen(mark("a", 1, {}, first=True), mark(record.END, 1))
    first = compare.first_difference(reference, other)
    assert first is not None
    assert first.place == record.END


def test_idle_streams() -> None:
    """A stream that nobody draws from is not compared, one that somebody draws from is."""
    one = seen(mark("a", 0, {"stream:x": "1", "stream:y": "1"}, first=True))
    other = seen(mark("a", 0, {"stream:x": "2", "stream:y": "1"}, first=True))
    moved = seen(
        mark("a", 0, {"stream:x": "2", "stream:y": "1"}, first=True),
        mark("b", 1, {"stream:y": "2"}),
    )
    assert compare.idle_streams(one, other) == {"stream:x", "stream:y"}
    assert compare.idle_streams(one, moved) == {"stream:x"}
    assert compare.first_difference(one, other) is not None
    idle = {"stream:x"}
    assert (
        compare.first_difference(compare.without(one, idle), compare.without(other, idle)) is None
    )


def variables(*values: str | None) -> list[Mark]:
    """Marks "0", "1", … with the variable `best` of these values."""
    marks = []
    for number, value in enumerate(values):
        held = {} if value is None else {"`best` in main()": value}
        gone = [] if value is not None or number == 0 else ["`best` in main()"]
        marks.append(mark(str(number), number, variables=held, gone=gone, first=number == 0))
    return marks


def resumed_at(number: int, marks: list[Mark]) -> list[Seen]:
    """The first process came by "0" alone, the second one begins at a number."""
    first = mark("0", 0, variables={"`best` in main()": "0.1"}, first=True)
    later = marks[number:]
    again = mark(later[0].key, number, variables=later[0].variables, first=True)
    return seen(first, again, *later[1:])


def test_lost_variable() -> None:
    """A variable that is another one after a resume, and stays it, is lost."""
    reference = seen(*variables("0.1", "0.5", "0.6", "0.7"))
    (lost,) = compare.lost_variables(
        reference, resumed_at(1, variables("0.1", "0.0", "0.0", "0.0")), set()
    )
    assert (lost.before, lost.after, lost.step, lost.recovered) == ("0.5", "0.0", 1, False)
    assert words.about_lost(lost).startswith("`best` in main() was 0.5, is 0.0 after resuming")
    missing = compare.lost_variables(
        reference, resumed_at(1, variables("0.1", None, None, None)), set()
    )
    assert missing[0].after == compare.ABSENT


def test_temporary_variable() -> None:
    """One that the next item sets again is not lost; one that a later item sets is, for a while."""
    reference = seen(*variables("0.1", "0.5", "0.6", "0.7"))
    again = resumed_at(1, variables("0.1", "0.0", "0.6", "0.7"))
    assert compare.lost_variables(reference, again, set()) == []
    later = resumed_at(1, variables("0.1", "0.0", "0.0", "0.7"))
    assert [one.recovered for one in compare.lost_variables(reference, later, set())] == [True]


def test_unstable_variable() -> None:
    """One that differs between undisturbed runs (a time) says nothing."""
    reference, again = seen(*variables("1", "2", "3")), seen(*variables("1", "2", "4"))
    unstable = compare.unstable_variables(reference, again)
    assert unstable == {"`best` in main()"}
    resumed = resumed_at(1, variables("1", "9", "9"))
    assert compare.lost_variables(reference, resumed, unstable) == []


def test_a_torn_last_line() -> None:
    """A line that a kill cut off is left out."""
    lines = [record.encode(mark("a", 0)), record.encode(mark("b", 1))[:-7]]
    assert [one.mark.key for one in record.expand(lines)] == ["a"]


def test_moments() -> None:
    """Within a loop, at an inner loop's end, and a kill comes some steps after its checkpoint."""
    for seed in range(20):
        strikes = plan.choose(straight(), count=3, kinds=["TERM", "KILL"], seed=seed, steps=[])
        struck = [one for one in strikes if one.how != record.CHECKPOINT]
        assert [one.how for one in struck] == ["TERM", "KILL", "TERM"]
        resumed = [one.key for one in strikes if one.how != "KILL"]
        assert any(key.endswith(" end") for key in resumed), seed
        assert any(key.endswith("item") for key in resumed), seed
        steps = [one.step for one in strikes]
        assert steps == sorted(steps), seed
    assert len(plan.choose(straight(), count=99, kinds=["TERM"], seed=0, steps=[])) == 12


def test_moments_by_step() -> None:
    """Steps that are asked for, in order; others are refused with what there is."""
    strikes = plan.choose(straight(), count=9, kinds=["TERM"], seed=0, steps=[4, 1])
    assert [one.step for one in strikes] == [1, 4]
    with pytest.raises(UsageError, match="only 0 to 6"):
        plan.choose(straight(), count=1, kinds=["TERM"], seed=0, steps=[7])
    with pytest.raises(UsageError, match="no safe point"):
        plan.choose([], count=1, kinds=["TERM"], seed=0, steps=[])


def test_files() -> None:
    """Files are compared by length and content; a missing one is shown as such."""
    before, after = {"a": (1, "x"), "b": (2, "y")}, {"a": (1, "z"), "c": (3, "w")}
    found = {one.path: (one.before, one.after) for one in compare.files_differing(before, after)}
    assert found == {"a": (1, 1), "b": (2, None), "c": (None, 3)}


def test_what_is_surely_read() -> None:
    """Of a function's variables it is known that they are read, and of no others."""
    assert _is_surely_read("`best` in main()")
    assert _is_surely_read("`best`")
    assert not _is_surely_read("`self.best` in fit()")
    assert not _is_surely_read("`cache` (global)")
    assert not _is_surely_read("`cache` in data")
