"""`ckptd status`: what runs, how far it is, and what is durable."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ckptd.cli import options
from ckptd.errors import CkptdError
from ckptd.host.disk import RealDisk
from ckptd.store import store
from ckptd.supervisor import journal, server
from ckptd.supervisor import run as runs
from ckptd.supervisor.policy import described
from ckptd.supervisor.run import Run

_ANSWER_BOUND_S = 5.0


@click.command()
@click.argument("name", required=False)
@options.directory
def command(name: str | None, directory: Path) -> int:
    """What runs, how far it is, and what is durable. Without NAME: all runs in one table."""
    if name is not None:
        _one(runs.find(directory, name))
        return 0
    found = runs.runs(directory)
    if not found:
        click.echo(f"no runs in {directory}")
        return 0
    _table([look(Run(path)) for path in found])
    return 0


def look(run: Run) -> dict[str, Any]:
    """What is known of a run, by name; asks its supervisor when one runs."""
    events = journal.read(run.journal)
    newest = next(iter(store.listing(RealDisk(), run.checkpoints)), None)
    facts: dict[str, Any] = {"run": run.path.name, "state": _ended_state(events)}
    if newest is not None:
        facts["durable step"] = newest.step
        facts["durable age s"] = round(max(0.0, time.time() - newest.created), 1)
    facts["restarts"] = max(sum(event["event"] == "started" for event in events) - 1, 0)
    facts["last end"] = _last_end(events)
    holder = run.supervisor()
    if holder is None:
        return facts
    alive = holder.alive()
    if alive is None:
        return {**facts, "state": f"runs on {holder.host}, or did"}
    if not alive:
        return {**facts, "state": "its supervisor was killed; launch it again"}
    try:
        answer = server.ask(holder.socket, "status", _ANSWER_BOUND_S)
    except CkptdError as error:
        return {**facts, "state": f"runs (process {holder.pid}), but {error}"}
    live = {key: value for key, value in answer.facts.items() if value not in (None, "")}
    return {**facts, "process": holder.pid, **live}


def _one(run: Run) -> None:
    facts = look(run)
    width = max(map(len, facts))
    for key, value in facts.items():
        if value is not None:
            click.echo(f"{key:<{width}}  {value}")


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = ("run", "state", "place", "step", "rate", "durable step", "durable age s", "restarts")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(c) is None else str(row[c]) for c in columns))
    Console().print(table)


def _ended_state(events: list[dict[str, Any]]) -> str:
    """What the journal says of a run that nobody supervises."""
    for event in reversed(events):
        if event["event"] in ("finished", "stopped", "gave up", "fenced"):
            return str(event["event"])
    return "not running" if events else "never started"


def _last_end(events: list[dict[str, Any]]) -> str | None:
    """Why the last attempt ended, or the last word of the supervisor."""
    for event in reversed(events):
        if event["event"] in ("stopped", "gave up", "fenced"):
            return str(event["text"])
        if event["event"] == "exited" and event["code"] != 0:
            return described(event["code"])
    return None
