"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_HELP = "Where the runs are.  [default: $CKPTD_DIR or ./ckptd-runs]"


def directory(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--dir`: the directory of all runs, absolute."""
    return click.option(
        "--dir", "directory", type=click.Path(path_type=Path), callback=_absolute, help=_HELP
    )(function)


def _absolute(context: click.Context, option: click.Parameter, value: Path | None) -> Path:  # noqa: ARG001
    return (value or Path(os.environ.get("CKPTD_DIR", "ckptd-runs"))).absolute()
