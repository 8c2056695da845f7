"""A file system in memory that forgets, at a power cut, whatever was not synced.

Rules:

1. A file's content is durable once `sync` returned. Before that, a power cut leaves it whole, empty
   or cut in half.
2. A directory's entry (made, renamed, removed) is durable once `sync_directory` of that directory
   returned. Before that, each change may or may not be there after a power cut, whatever became of
   the changes before it. A rename within a directory is one change.
3. A failing write leaves half of its content behind, and a failing removal of a tree half of its
   entries: what a full disk does.
4. After a power cut nothing works any more; `survivors` are the disks that may be found then.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ckptd.host.disk import Content, RealDisk

ALL_UP_TO = 2**10
CHOSEN = 300
PIECE = 16
CONTENT_OPTIONS = 3  # whole, empty, half


class PowerCut(BaseException):
    """The machine is off: no `except Exception` can go on after it."""


@dataclass
class Fault:
    """What goes wrong at operation `at`, counted from 1; 0 is never.

    Attributes:
        how: "once", "ever" (from then on), "cut" (power, before the operation) or "cut within"
            (power, half way through it).
        code: the errno of a failure.
    """

    at: int = 0
    how: str = "once"
    code: int = errno.EIO
    count: int = 0
    struck: bool = False

    def due(self, path: Path) -> Exception | PowerCut | None:
        """Count an operation; what ends it, if anything does."""
        self.count += 1
        if self.at == 0 or self.count < self.at or (self.how == "once" and self.struck):
            return None
        self.struck = True
        if self.how in {"once", "ever"}:
            return OSError(self.code, os.strerror(self.code), str(path))
        return PowerCut()

    @property
    def within(self) -> bool:
        """Whether half of the operation is done before it ends."""
        return self.how != "cut" and self.count == self.at


@dataclass(eq=False)
class File:
    """A file: what a reader finds now, and whether a power cut leaves it so."""

    content: bytes
    synced: bool = False

    def surviving(self, option: int) -> bytes:
        return (self.content, b"", self.content[: len(self.content) // 2])[option]


@dataclass(eq=False)
class Directory:
    """A directory: its entries now, the durable ones, and the changes between the two."""

    entries: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, changes: dict[str, Node | None]) -> None:
        apply(self.entries, changes)
        self.pending.append(changes)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.entries), []


Node = File | Directory


def apply(entries: dict[str, Node], changes: dict[str, Node | None]) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def refusal(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))


class SimulatedDisk:
    """The `Disk` protocol in memory; `root` exists and is durable."""

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root = root
        self.fault = fault or Fault()
        self.tree = Directory()

    # The operations of the protocol.

    def make_directory(self, path: Path) -> None:
        self._begin(path)
        parent = self._parent(path)
        if path.name in parent.entries:
            raise refusal(errno.EEXIST, path)
        parent.change({path.name: Directory()})

    def write(self, path: Path, content: Content) -> None:
        whole = memoryview(content).tobytes()
        ending = self._count(path)
        if ending and not self.fault.within:
            raise ending
        parent = self._parent(path)
        if path.name in parent.entries:
            raise refusal(errno.EEXIST, path)
        parent.change({path.name: File(whole[: len(whole) // 2] if ending else whole)})
        if ending:
            raise ending

    def link(self, source: Path, target: Path) -> bool:
        self._begin(target)
        file, parent = self._file(source), self._parent(target)
        if target.name in parent.entries:
            raise refusal(errno.EEXIST, target)
        parent.change({target.name: file})
        return True

    def sync(self, path: Path) -> None:
        self._begin(path)
        self._file(path).synced = True

    def sync_directory(self, path: Path) -> None:
        self._begin(path)
        self._directory(path).sync()

    def rename(self, source: Path, target: Path) -> None:
        self._begin(source)
        parent, node = self._parent(source), self._node(source)
        if self._parent(target) is not parent:
            raise refusal(errno.EXDEV, target)  # the store renames within one directory only
        there = parent.entries.get(target.name)
        if isinstance(there, Directory) and isinstance(node, File):
            raise refusal(errno.EISDIR, target)
        if isinstance(there, File) and isinstance(node, Directory):
            raise refusal(errno.ENOTDIR, target)
        if isinstance(there, Directory) and there.entries:
            raise refusal(errno.ENOTEMPTY, target)
        parent.change({source.name: None, target.name: node})

    def remove(self, path: Path) -> None:
        self._begin(path)
        self._file(path)
        self._parent(path).change({path.name: None})

    def remove_tree(self, path: Path) -> None:
        ending = self._count(path)
        if ending and not self.fault.within:
            raise ending
        node = self._node(path)
        if isinstance(node, Directory):
            names = list(node.entries)
            self._empty(node, names[: len(names) // 2] if ending else names)
        if ending:
            raise ending
        self._parent(path).change({path.name: None})

    def names(self, path: Path) -> list[str]:
        self._begin(path)
        try:
            return sorted(self._directory(path).entries)
        except FileNotFoundError:
            return []

    def size(self, path: Path) -> int:
        self._begin(path)
        return len(self._regular(path).content)

    def identity(self, path: Path) -> object:
        self._begin(path)
        return id(self._node(path))

    def read(self, path: Path) -> Content:
        self._begin(path)
        return self._regular(path).content

    def stream(self, path: Path) -> Iterator[memoryview]:
        self._begin(path)
        with memoryview(self._regular(path).content) as content:
            for at in range(0, len(content), PIECE):
                yield content[at : at + PIECE]

    def pieces(self, path: Path, places: Iterable[int], length: int) -> list[bytes]:
        self._begin(path)
        content = self._regular(path).content
        return [bytes(content[at : at + length]) for at in places]

    # What a test does to the disk: never counted, never failing, durable at once.

    def damage(self, path: Path, content: bytes) -> None:
        """Change a file's content, as a bad sector does."""
        self._file(path).content = content

    def lose(self, path: Path) -> None:
        """Remove a directory, if it is there, as somebody does who needs the room; not synced."""
        with suppress(FileNotFoundError):
            self._directory(path)
            self._parent(path).change({path.name: None})

    def fingerprint(self) -> object:
        """What a reader of the whole disk finds."""
        return _fingerprint(self.tree)

    def survivors(self, seed: int, limit: int = ALL_UP_TO) -> Iterator[SimulatedDisk]:
        """The disks that a power cut now may leave: all, or a choice by seed where many."""
        for option in self._options(seed, limit):
            disk = SimulatedDisk(self.root)
            disk.tree = _surviving_directory(self.tree, option)
            yield disk

    def copy(self) -> SimulatedDisk:
        """The disk without a power cut, for a look that changes nothing here."""
        disk = SimulatedDisk(self.root)
        disk.tree = _copy(self.tree)
        return disk

    # Parts.

    def _options(self, seed: int, limit: int) -> Iterator[dict[int, int]]:
        open_ends = dict(_open_ends(self.tree, set()))
        keys, sizes = list(open_ends), list(open_ends.values())
        if math.prod(sizes) <= limit:
            for values in itertools.product(*map(range, sizes)):
                yield dict(zip(keys, values, strict=True))
            return
        chance = random.Random(seed)
        yield {}  # everything kept
        yield {key: size - 1 for key, size in open_ends.items()}
        for _ in range(min(limit, CHOSEN) - 2):
            yield {key: chance.randrange(size) for key, size in open_ends.items()}

    def _count(self, path: Path) -> BaseException | None:
        return self.fault.due(path)

    def _begin(self, path: Path) -> None:
        if ending := self._count(path):
            raise ending

    def _node(self, path: Path) -> Node:
        node: Node = self.tree
        for part in path.relative_to(self.root).parts:
            if isinstance(node, File):
                raise refusal(errno.ENOTDIR, path)
            if part not in node.entries:
                raise refusal(errno.ENOENT, path)
            node = node.entries[part]
        return node

    def _directory(self, path: Path) -> Directory:
        node = self._node(path)
        if isinstance(node, File):
            raise refusal(errno.ENOTDIR, path)
        return node

    def _parent(self, path: Path) -> Directory:
        return self._directory(path.parent)

    def _file(self, path: Path) -> File:
        node = self._node(path)
        if isinstance(node, Directory):
            raise refusal(errno.EISDIR, path)
        return node

    def _regular(self, path: Path) -> File:
        node = self._node(path)
        if isinstance(node, Directory):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return node

    def _empty(self, directory: Directory, names: list[str]) -> None:
        for name in names:
            node = directory.entries[name]
            if isinstance(node, Directory):
                self._empty(node, list(node.entries))
            directory.change({name: None})


class FailingRealDisk(RealDisk):
    """The real file system, on which operation n fails."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def make_directory(self, path: Path) -> None:
        self._begin(path)
        super().make_directory(path)

    def write(self, path: Path, content: Content) -> None:
        if ending := self.fault.due(path):
            if self.fault.within:
                super().write(path, memoryview(content).tobytes()[: len(content) // 2])
            raise ending
        super().write(path, content)

    def link(self, source: Path, target: Path) -> bool:
        self._begin(target)
        return super().link(source, target)

    def sync(self, path: Path) -> None:
        self._begin(path)
        super().sync(path)

    def sync_directory(self, path: Path) -> None:
        self._begin(path)
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._begin(source)
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._begin(path)
        super().remove(path)

    def remove_tree(self, path: Path) -> None:
        self._begin(path)
        super().remove_tree(path)

    def names(self, path: Path) -> list[str]:
        self._begin(path)
        return super().names(path)

    def size(self, path: Path) -> int:
        self._begin(path)
        return super().size(path)

    def identity(self, path: Path) -> object:
        self._begin(path)
        return super().identity(path)

    def read(self, path: Path) -> Content:
        self._begin(path)
        return super().read(path)

    def stream(self, path: Path) -> Iterator[memoryview]:
        self._begin(path)
        yield from super().stream(path)

    def pieces(self, path: Path, places: Iterable[int], length: int) -> list[bytes]:
        self._begin(path)
        return super().pieces(path, places, length)

    def damage(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)

    def lose(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def _begin(self, path: Path) -> None:
        if ending := self.fault.due(path):
            raise ending


def _open_ends(directory: Directory, seen: set[int]) -> Iterator[tuple[int, int]]:
    """(identity, number of outcomes) of each thing that a power cut decides on."""
    if id(directory) in seen:
        return
    seen.add(id(directory))
    reachable = list(directory.durable.values())
    for change in directory.pending:
        yield id(change), 2
        reachable += [node for node in change.values() if node is not None]
    for node in reachable:
        if isinstance(node, Directory):
            yield from _open_ends(node, seen)
        elif not node.synced and id(node) not in seen:
            seen.add(id(node))
            yield id(node), CONTENT_OPTIONS


def _surviving_directory(directory: Directory, option: dict[int, int]) -> Directory:
    entries = dict(directory.durable)
    for change in directory.pending:
        if option.get(id(change), 0) == 0:
            apply(entries, change)
    kept: dict[str, Node] = {}
    for name, node in entries.items():
        if isinstance(node, Directory):
            kept[name] = _surviving_directory(node, option)
        else:
            outcome = 0 if node.synced else option.get(id(node), 0)
            kept[name] = File(node.surviving(outcome), synced=True)
    return Directory(dict(kept), dict(kept))


def _copy(directory: Directory) -> Directory:
    kept: dict[str, Node] = {
        name: _copy(node) if isinstance(node, Directory) else File(node.content, synced=True)
        for name, node in directory.entries.items()
    }
    return Directory(dict(kept), dict(kept))


def _fingerprint(directory: Directory) -> object:
    return tuple(
        (name, _fingerprint(node) if isinstance(node, Directory) else node.content)
        for name, node in sorted(directory.entries.items(), key=lambda pair: pair[0])
    )
