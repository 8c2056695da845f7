"""Which attempt of a job may publish.

Every attempt claims a number by creating a file of that name: creation is exclusive also on a
network file system, where locks may not be. Who finds a larger number than its own is an old copy
that still runs on a machine that was given up; it must not publish any more. So is who finds
numbers and not its own: the run was started over, and they were counted anew.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from ckptd.errors import FencedError
from ckptd.host.disk import Disk

_KEPT: Final = 8
_CLAIMS_MAX: Final = 1000


def claim(disk: Disk, run: Path, who: str) -> int:
    """Claim the next attempt's number.

    Args:
        disk: where to.
        run: the run's directory.
        who: a line for people (host and process), the file's content.

    Raises:
        FencedError: others kept claiming at the same time.
        OSError: the disk refused.
    """
    directory = run / "attempts"
    if not disk.names(directory):
        with suppress(FileExistsError):  # there, and empty
            disk.make_directory(directory)
        disk.sync_directory(run)
    for _ in range(_CLAIMS_MAX):
        number = max(_numbers(disk, directory), default=0) + 1
        path = directory / _name(number)
        try:
            disk.write(path, who.encode())
        except FileExistsError:
            continue  # another supervisor was faster: the next number
        disk.sync(path)
        disk.sync_directory(directory)
        for old in disk.names(directory)[:-_KEPT]:
            with suppress(FileNotFoundError):  # whoever claimed at the same time was faster
                disk.remove(directory / old)
        return number
    raise FencedError(f"{directory}: could not claim a number in {_CLAIMS_MAX} tries")


def is_there(disk: Disk, run: Path, attempt: int) -> bool:
    """Whether this is the directory, and not another one of its name, in which it was claimed.

    By its own name, which nobody here has asked for before: what a network file system remembers of
    the directory's content may be older than the claim.
    """
    try:
        return disk.size(run / "attempts" / _name(attempt)) > 0
    except FileNotFoundError:
        return False


def check(disk: Disk, run: Path, attempt: int) -> None:
    """Refuse to go on when a newer attempt exists, or when this one is none of the run's.

    Raises:
        FencedError: names both numbers.
    """
    numbers = _numbers(disk, run / "attempts")
    if not numbers:
        return  # somebody removed them: no other copy has claimed one since
    largest = max(numbers)
    if largest > attempt:
        found = f"attempt {largest} was started elsewhere"
    elif attempt not in numbers:
        found = f"the run was started over elsewhere and is at attempt {largest}"
    else:
        return
    raise FencedError(
        f"this is attempt {attempt} of the job, and {found}: "
        "this old copy publishes nothing any more and ends itself"
    )


def carry_over(disk: Disk, old: Path, new: Path, who: str) -> None:
    """Give a run that takes the place of another one a larger number than that one has.

    So that no old copy may publish into the new one, from the first moment on.

    Raises:
        OSError: the disk refused.
    """
    numbers = _numbers(disk, old / "attempts")
    if numbers:
        directory = new / "attempts"
        disk.make_directory(directory)
        path = directory / _name(max(numbers) + 1)
        disk.write(path, who.encode())
        disk.sync(path)
        disk.sync_directory(directory)
    disk.sync_directory(new)


def _numbers(disk: Disk, directory: Path) -> set[int]:
    return {int(name) for name in disk.names(directory) if name.isdecimal()}


def _name(number: int) -> str:
    return f"{number:06d}"
