"""What a person reads after giving up: the command's last lines, whole, however they came."""

from __future__ import annotations

from conftest import Workshop
from launched import no_leftovers, python  # noqa: F401  # a fixture for every test here

SOURCE = """
import sys, time
for number in range(30):
    for piece in ("line ", str(number), " of the end", chr(10)):
        sys.stdout.write(piece)
        sys.stdout.flush()
        time.sleep(0.001)
sys.stdout.write("and no end of line")
sys.exit(1)
"""


def test_last_lines_are_whole(workshop: Workshop) -> None:
    """Lines that were written in pieces are shown as lines."""
    done = workshop.launch(*python(SOURCE), options=("--max-restarts", "0"))
    assert done.returncode == 70
    shown = [line.removeprefix("ckptd:   ") for line in done.stderr.splitlines()]
    expected = [*(f"line {number} of the end" for number in range(10, 30)), "and no end of line"]
    at = shown.index("line 10 of the end")
    assert shown[at : at + len(expected)] == expected
    assert shown[at - 1] == "ckptd: the last lines of its output:"


def test_a_new_attempt_begins_a_line(workshop: Workshop) -> None:
    """Whoever was killed in the middle of a line does not swallow the first one of the next."""
    dies = python("print('half', end=''); raise SystemExit(1)")
    for _ in range(2):
        done = workshop.launch(*dies, options=("--name", "job", "--max-restarts", "0"))
        assert done.returncode == 70
    assert (workshop.path / "runs" / "job" / "log").read_text() == "half\nhalf"
