"""Which attempt of a job may publish.

Every attempt claims a number by creating a file of that name: creation is exclusive also on a
network file system, where locks may not be. Who finds a larger number than its own is an old copy
that still runs on a machine that was given up; it must not publish any more.
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
        number = _largest(disk, directory) + 1
        path = directory / f"{number:06d}"
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


def check(disk: Disk, run: Path, attempt: int) -> None:
    """Refuse to go on when a newer attempt exists.

    Raises:
        FencedError: names both numbers.
    """
    largest = _largest(disk, run / "attempts")
    if largest > attempt:
        raise FencedError(
            f"this is attempt {attempt} of the job, and attempt {largest} was started elsewhere: "
            "this old copy publishes nothing any more and ends itself"
        )


def _largest(disk: Disk, directory: Path) -> int:
    return max((int(name) for name in disk.names(directory) if name.isdecimal()), default=0)
