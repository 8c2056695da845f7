"""A checkpoint's manifest: the name, length and xxh3-128 of every other file in its directory.

The manifest carries a sum of itself, so that no digit of it can change unseen. What `decode`
accepts is well-formed; whether the files are what it says is `store.verify`'s to find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

import msgspec
import xxhash

from ckptd.errors import DamagedError

T = TypeVar("T")

NAME: Final = "manifest.json"
#: The file that every checkpoint has: all that is no tensor.
STATE: Final = "state.json"
FORMAT: Final = 1

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_RANK_FILE: Final = re.compile(r"rank-([1-9][0-9]{0,5})\.(.+)")
_SUM: Final = re.compile(r"[0-9a-f]{32}")
_FILES_MAX: Final = 100_000
#: No manifest is longer: a file takes its name of 200, its length of 19, its sum, and 50 around.
BYTES_MAX: Final = _FILES_MAX * 301
_LENGTH_MAX: Final = 2**60
#: As many digits as a checkpoint's name has room for.
_NUMBER_MAX: Final = 10**18 - 1


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its length in bytes and its xxh3-128 in hexadecimal digits."""

    length: int
    xxh3_128: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint's directory must hold.

    Attributes:
        step: items of innermost loops that were done.
        attempt: the number of the attempt that wrote it.
        created: seconds since 1970, a label for people.
    """

    format: int
    step: int
    attempt: int
    created: float
    files: dict[str, File]


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    manifest: msgspec.Raw
    xxh3_128: str


class _Versioned(msgspec.Struct):
    format: int


def sum_of(content: bytes | bytearray | memoryview) -> str:
    """The xxh3-128 of some bytes, as it stands in a manifest."""
    return xxhash.xxh3_128_hexdigest(content)


def described(content: Iterable[memoryview]) -> File:
    """The length and sum of some bytes that come in pieces."""
    length, total = 0, xxhash.xxh3_128()
    for piece in content:
        length += piece.nbytes
        total.update(piece)
    return File(length, total.hexdigest())


def encode(manifest: Manifest) -> bytes:
    """The manifest file's content.

    Raises:
        ValueError: files that `decode` would refuse.
    """
    if STATE not in manifest.files or len(manifest.files) > _FILES_MAX:
        raise ValueError(f"a checkpoint has {STATE}, and at most {_FILES_MAX} files")
    for name in manifest.files:
        if not is_file_name(name):
            raise ValueError(f"{name!r} can't be a file of a checkpoint")
    body = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Sealed(msgspec.Raw(body), sum_of(body)))


def decode(content: bytes, where: str) -> Manifest:
    """Read a manifest file.

    Args:
        content: the file's bytes.
        where: its path, for errors.

    Raises:
        DamagedError: says what was found and what was expected.
    """
    try:
        sealed = msgspec.json.decode(content, type=_Sealed)
        body = bytes(sealed.manifest)
        if sum_of(body) != sealed.xxh3_128:
            raise DamagedError(
                f"{where}: its sum is {sum_of(body)}, it says {sealed.xxh3_128}: it was changed"
            )
        found = msgspec.json.decode(body, type=_Versioned).format
        if found != FORMAT:
            raise DamagedError(
                f"{where}: format {found}, this ckptd reads format {FORMAT} (written by another "
                "version?)"
            )
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{where}: not a manifest: {error}") from error
    _check(manifest, where)
    return manifest


def is_file_name(name: str) -> bool:
    """Whether a checkpoint's file may be called so: no path, nothing hidden, not the manifest."""
    return bool(_FILE_NAME.fullmatch(name)) and name != NAME


def rank_file(rank: int, name: str) -> str:
    """What the file that a rank calls `name` is called in a checkpoint; rank 0 has the plain names.

    No tracked object's file can be called so: an object's name is an identifier.
    """
    return name if rank == 0 else f"rank-{rank}.{name}"


def in_checkpoint(rank: int, files: Mapping[str, T]) -> dict[str, T]:
    """What a rank knows by its own names, by the names in the checkpoint."""
    return {rank_file(rank, name): what for name, what in files.items()}


def files_of(rank: int, names: Iterable[str]) -> dict[str, str]:
    """A rank's files: by the names that the rank has for them, those in the checkpoint."""
    own = {}
    for name in names:
        found = _RANK_FILE.fullmatch(name)
        if rank == (0 if found is None else int(found[1])):
            own[name if found is None else found[2]] = name
    return own


def first_of(name: str) -> str | None:
    """What rank 0 calls a file that is another rank's; None: it is rank 0's."""
    found = _RANK_FILE.fullmatch(name)
    return None if found is None else found[2]


def ranks_in(names: Iterable[str]) -> int:
    """Of how many ranks a checkpoint is."""
    return 1 + sum(first_of(name) == STATE for name in names)


def _check(manifest: Manifest, where: str) -> None:
    numbers = (manifest.step, manifest.attempt)
    if min(numbers) < 0 or max(numbers) > _NUMBER_MAX or len(manifest.files) > _FILES_MAX:
        raise DamagedError(f"{where}: step, attempt or the number of files is out of range")
    if STATE not in manifest.files:
        raise DamagedError(f"{where}: lists no {STATE}, which every checkpoint has")
    for name, file in manifest.files.items():
        if not is_file_name(name):
            raise DamagedError(f"{where}: lists a file {name!r}, which is no file name here")
        if not 0 <= file.length <= _LENGTH_MAX or not _SUM.fullmatch(file.xxh3_128):
            raise DamagedError(f"{where}: {name}: length or sum is out of range")
