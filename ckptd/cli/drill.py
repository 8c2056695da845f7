"""`ckptd drill`: does this script really continue as if it had never been interrupted?"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from ckptd import record
from ckptd.cli.launch import check_command
from ckptd.drill import words
from ckptd.drill.drill import Drill, Verdict
from ckptd.errors import UsageError

_KINDS = (*record.SIGNALS, record.KILL, record.ORPHAN)
_DIFFERS = 1  # the exit code


@click.command(context_settings={"ignore_unknown_options": False})
@click.option(
    "--interrupts",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How often to interrupt.",
)
@click.option(
    "--with",
    "kinds",
    default="TERM,KILL",
    show_default=True,
    metavar="KIND,...",
    help=f"What to interrupt with, in turn: {', '.join(_KINDS)} (KILL: the worker; ORPHAN: the "
    "supervisor).",
)
@click.option("--at", "steps", metavar="STEP,...", help="Interrupt at these steps.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides about the moments.")
@click.option(
    "--files/--no-files",
    default=True,
    show_default=True,
    help="Compare the files that the script writes into its working directory, too; those that "
    "differ between uninterrupted runs are left out. What `job.open` wrote is always compared.",
)
@click.option("--fixed-addresses", is_flag=True, help="As for `ckptd launch`.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the result there as well."
)
@click.option(
    "--keep", is_flag=True, help="Keep the runs' directories also when everything is equal."
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def command(
    argv: tuple[str, ...],
    interrupts: int,
    kinds: str,
    steps: str | None,
    seed: int,
    json_file: Path | None,
    *,
    files: bool,
    fixed_addresses: bool,
    keep: bool,
) -> int:
    """Run COMMAND three times and compare bit for bit: twice undisturbed, once interrupted.

    Each run works in a copy of this directory; take a short setting of your script. Exit code 0
    only if everything is equal, 1 if something differs, and then it says what, where and why.
    """
    check_command(argv[0])
    wanted, at = _kinds(kinds), _steps(steps)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the run, too
    place = Path(tempfile.mkdtemp(prefix="ckptd-drill-"))
    options = ["--fixed-addresses"] if fixed_addresses else []
    verdict = None
    try:
        drill = Drill(place, argv, options, files=files, progress=_progress)
        for text in drill.linked:
            print(f"ckptd: linked and not copied, do not write there: {text}", file=sys.stderr)
        verdict = drill.run(count=interrupts, kinds=wanted, seed=seed, steps=at)
    finally:
        if verdict is not None and verdict.equal and not keep:
            shutil.rmtree(place)
        else:
            print(f"ckptd: the runs are kept in {place}", file=sys.stderr)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(verdict)) + b"\n")
    _show(verdict)
    return 0 if verdict.equal else _DIFFERS


# ------------------------------------------------------------------ the table


def _show(verdict: Verdict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    versus = "interrupted" if verdict.deterministic else "undisturbed again"
    table = Table(box=None, pad_edge=False)
    table.add_column("compared bit for bit")
    table.add_column(versus)
    for name, result in _rows(verdict):
        table.add_row(Text(name), Text(result, style="green" if result == "equal" else "bold red"))
    console.print(table)
    if verdict.strikes:
        struck = [s for s in verdict.strikes if s.how != record.CHECKPOINT]
        shown = ", ".join(f"{s.how} at step {s.step}" for s in struck)
        console.print(f"\ninterrupted {len(struck)} times: {shown}", markup=False)
    for text in verdict.findings:
        console.print(f"- {text}", markup=False, soft_wrap=True)
    conclusion = (
        f"all equal: {verdict.steps} steps, {verdict.safe_points} safe points"
        if verdict.equal
        else "NOT equal"
    )
    console.print(f"\n{conclusion}", style="bold green" if verdict.equal else "bold red")


def _rows(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """(what, result): objects one by one, the rest together as long as it is equal."""
    together: dict[str, list[str]] = {}
    for name, step in sorted(verdict.components.items()):
        kind, _, text = name.partition(":")
        if step is not None:
            yield words.described(name), f"differs from step {step}"
        elif kind == "object" and "(" not in text:
            yield text, "equal"
        elif kind != "object":
            together.setdefault(kind, []).append(text)
    labels = {
        "vars": "values in job.vars",
        "settings": "settings of torch",
        "stream": "random streams",
        "loader": "random streams of loaders, samplers and their workers",
        "items": "loops' items (batches)",
        "logged": "logged values",
    }
    for kind, label in labels.items():
        if kind in together:
            yield f"{len(together[kind])} {label}", "equal"
    lost = [one.name for one in verdict.lost]
    if verdict.deterministic:
        yield "the script's variables", "equal" if not lost else f"{len(lost)} lost"
    yield "files", "equal" if not verdict.files else f"{len(verdict.files)} differ"
    codes = verdict.codes
    yield "exit code", "equal" if codes[0] == codes[1] else f"{codes[0]} and {codes[1]}"


# ------------------------------------------------------------------ the small things


def _kinds(text: str) -> list[str]:
    kinds = [word.strip().upper().removeprefix("SIG") for word in text.split(",") if word.strip()]
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown or not kinds:
        raise UsageError(f"--with {text}: known are {', '.join(_KINDS)}")
    return kinds


def _steps(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--at {text}: numbers of steps, such as --at 12,40") from None


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a run is: a bar on a terminal, else a line at its begin and its end."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"ckptd: drill: {name} …", file=sys.stderr, flush=True)
        yield lambda done: None  # noqa: ARG005  # nothing is drawn
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(name, total=total or None)
        yield lambda done: bar.update(task, completed=min(done, total) if total else done)
