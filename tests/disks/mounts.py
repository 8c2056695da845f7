"""Small file systems of a test's own, where they can be made; elsewhere the test is skipped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def mount(*words: str) -> None:
    """`mount WORDS`, or skip the test and say why."""
    try:
        subprocess.run(["mount", *words], check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system can be mounted here: {error.stderr.partition(chr(10))[0]}")


@contextmanager
def mounted(path: Path, *words: str) -> Iterator[Path]:
    """A directory that is a file system of its own; `words` are mount's, before the directory."""
    path.mkdir(exist_ok=True)
    mount(*words, str(path))
    try:
        yield path
    finally:
        # Lazily: a test that failed may have left something that still looks into it.
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=60)


def fill(path: Path) -> None:
    """Write a file until not a byte is left."""
    with path.open("wb", buffering=0) as filler:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while filler.write(bytes(size)):
                    pass
            except OSError:
                continue
