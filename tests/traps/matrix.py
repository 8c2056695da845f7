"""The loader configurations of the trap matrix, as plain words: no torch is imported here.

Every pair of values of two factors occurs in some row (`test_loader_traps` counts them), but the
product of all factors does not. Rows are dealt into groups; a group is one job, in which the
loaders of its rows take turns, so that a stop within one of them finds all others between epochs.
"""

from dataclasses import dataclass, fields

SAMPLERS = (
    *("shuffle", "generator", "weighted", "subset"),
    *("distributed", "own batches", "unbatched", "drop last"),
)
#: Worker processes, and whether they persist.
WORKERS = ((0, False), (1, False), (1, True), (3, False), (3, True))
PREFETCH = (1, 2, 5)
#: The generator that the dataset keeps for itself; each item also draws from the global streams.
KEEPS = ("nothing", "random.Random", "numpy", "torch")
#: "before": asked before the loop. "begin": asked while the loader's iterator is being made.
MOMENTS = ("before", "begin", "first", "mid", "last")
EPOCHS = 3

_SOME = ("before", "first", "last")
_OTHERS = ("before", "mid", "last")
#: Cases that are not of the matrix (`loaders.GROUPS`), by group, with their moments.
SPECIAL = {
    "made": {
        "anew": _OTHERS,
        "anew_constant": ("before", "first", "mid"),
        "anew_shared": _OTHERS,
        "reseeded": _SOME,
        "twice": _OTHERS,
        "spawned": ("first", "last"),
    },
    "hidden": {
        "transformed": _SOME,
        "closed_over": _OTHERS,
        "collating": _SOME,
        "module_global": _OTHERS,
        "tracked": ("mid",),
    },
    "left": {
        "left": _SOME,
        "left_at_once": ("before", "first"),
        "left_mortal": _SOME,
        "growing": ("last", "before"),
    },
    "iterable": {
        "endless": _OTHERS,
        "iterable": _SOME,
        "iterable_persistent": _OTHERS,
        "iterable_left": _SOME,
        "interleaved": _OTHERS,
    },
    "stateful": {
        "stateful_here": _OTHERS,
        "stateful": _SOME,
        "stateful_persistent": _OTHERS,
        "stateful_left": _SOME,
        "own_position": _OTHERS,
    },
}
GROUPS = 5


@dataclass(frozen=True)
class Row:
    """One configuration of a loader, and the moment at which it is interrupted."""

    sampler: str
    workers: tuple[int, bool]
    prefetch: int
    pin: bool
    keeps: str
    init: bool
    moment: str

    @property
    def name(self) -> str:
        """As it stands in the trace."""
        return f"{self.sampler}-{self.workers[0]}{'p' * self.workers[1]}"


def rows() -> list[Row]:
    """All rows, in the order in which they are dealt into groups."""
    return [
        Row(
            sampler=sampler,
            workers=workers,
            prefetch=PREFETCH[(s // 3 + w // 2) % 3],
            pin=bool((s // 2 + w // 2) % 2),
            keeps=KEEPS[(s + w + w // 2) % 4],
            init=bool((w + s // 3) % 2),
            moment=MOMENTS[(s + w) % 5],
        )
        for w, workers in enumerate(WORKERS)
        for s, sampler in enumerate(SAMPLERS)
    ]


def group(number: int) -> list[Row]:
    """The rows of one group."""
    return rows()[number::GROUPS]


def missing_pairs() -> set[tuple[str, object, str, object]]:
    """Pairs of values of two factors that occur in no row."""
    every = rows()
    factors = [f.name for f in fields(Row)]
    found = {
        (a, getattr(row, a), b, getattr(row, b))
        for row in every
        for a in factors
        for b in factors
        if a < b
    }
    values = {f: {getattr(row, f) for row in every} for f in factors}
    wanted = {
        (a, x, b, y)
        for a in factors
        for b in factors
        if a < b
        for x in values[a]
        for y in values[b]
    }
    return wanted - found


def strikes(cases: list[tuple[str, tuple[str, ...]]]) -> list[str]:
    """One job's interruptions ("epoch/case/moment"), in the order in which its run meets them.

    A case's moments fall into different epochs, so that each is met with other histories.
    """
    met = [
        ((number + place) % EPOCHS, number, MOMENTS.index(moment), f"{name}/{moment}")
        for number, (name, moments) in enumerate(cases)
        for place, moment in enumerate(moments)
    ]
    return [f"{epoch}/{what}" for epoch, _, _, what in sorted(met)]
