"""A captured state as file images in one memfd, and a checkpoint read back.

A checkpoint's tensors lie in safetensors files: `NAME.safetensors` for each tracked object, under
the framework's own key names. Everything else is in `state.json`. A captured value (`Frozen`)
becomes an entry `{"tree": …, "tensors": [[file, key], …]}`; a tensor that safetensors has no type
for is stored as bytes, and its entry also gives the type and the shape.

Writing is one copy: the images are laid out first (`store.image`), then every tensor is copied,
bits as bits, to its place in the memfd.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from ckptd import wire
from ckptd.errors import DamagedError
from ckptd.host import memory
from ckptd.store import image
from ckptd.store.manifest import STATE
from ckptd.worker import tree
from ckptd.worker.arena import Arena, Arenas
from ckptd.worker.copies import Copies
from ckptd.worker.resting import Resting
from ckptd.worker.state import Saved
from ckptd.worker.tree import Frozen, Json

FORMAT: Final = 1
_ALIGNMENT: Final = 4096

#: safetensors' names of the element types that every version since 0.5 reads.
_DTYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_BY_NAME: Final = {name: dtype for dtype, name in _DTYPES.items()}
_ENDING: Final = ".safetensors"
_SAMPLE: Final = 64


class Writer:
    """Collects captured values and the tensors in them, and lays them out as files.

    Args:
        resting: knows which parameters are written into a file of their own.
    """

    def __init__(self, resting: Resting) -> None:
        self._resting = resting
        self._modules: dict[str, tuple[Frozen, list[list[Json]]]] = {}
        self._files: dict[str, dict[str, torch.Tensor]] = {}
        # By address: the tensors that begin there, and where each is.
        self._placed: dict[int, list[tuple[torch.Tensor, list[Json]]]] = {}

    def add(self, file: str, frozen: Frozen, *, own: bool = False) -> dict[str, Json]:
        """The entry for a captured value.

        Args:
            file: the file for its tensors, without the ending.
            frozen: the value.
            own: the file must hold all of them under their exact names, also those that another
                file holds already (a module's state_dict); what rests is kept apart.
        """
        path, beside = f"{file}{_ENDING}", resting_file(file)
        resting = self._resting.among(file, frozen.tensors) if own else ()
        refs = [
            self._place(beside if name in resting else path, name, tensor, own=own)
            for name, tensor in frozen.tensors
        ]
        if own:
            self._modules[file] = frozen, refs
        return {"tree": frozen.tree, "tensors": refs}

    def _place(self, file: str, name: str, tensor: torch.Tensor, *, own: bool) -> list[Json]:
        address = tensor.data_ptr()
        same = self._placed.get(address)
        if same and not own:
            for other, placed in same:
                if _is_same(tensor, other):
                    return placed
        tensors = self._files.setdefault(file, {})
        key, number = name, 2
        while key in tensors:
            key, number = f"{name}#{number}", number + 1
        tensors[key] = tensor
        ref: list[Json] = [file, key]
        if tensor.dtype not in _DTYPES:
            ref += [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        if not same:
            self._placed[address] = [(tensor, ref)]
        elif not any(_is_same(tensor, other) for other, _ in same):
            self._placed[address].append((tensor, ref))
        return ref

    def write(
        self, document: dict[str, Json], outputs: list[str], arenas: Arenas, layouts: Layouts
    ) -> tuple[Arena, wire.Table, wire.Place]:
        """Lay everything out in a memory that nobody reads.

        Returns:
            The memory, which the caller lets go of, what lies where in it, and where that itself
            is written down: behind the files.
        """
        text = msgspec.json.encode(document)
        images = {file: layouts.layout(file, tensors) for file, tensors in self._files.items()}
        extents = []
        end = 0
        for name, length in [(STATE, len(text)), *((f, i.length) for f, i in images.items())]:
            extents.append(wire.Extent(name, end, length))
            end += -(-length // _ALIGNMENT) * _ALIGNMENT
        table = wire.Table(extents, outputs)
        listed = wire.encode_table(table)
        place = wire.Place(end, len(listed))
        arena = arenas.take(end + len(listed))
        try:
            arena.mapping[: len(text)] = text
            arena.mapping[end : end + len(listed)] = listed
            with Copies(arena) as copies:
                for extent in extents[1:]:
                    header, tensors = images[extent.name].header, self._files[extent.name]
                    arena.mapping[extent.offset : extent.offset + len(header)] = header
                    for offset, tensor in zip(
                        images[extent.name].offsets, tensors.values(), strict=True
                    ):
                        copies.add(extent.offset + offset, tensor)
        except BaseException:
            arenas.let_go(arena)
            raise
        self._show_samples(arena, extents[1:], images)
        return arena, table, place

    def _show_samples(
        self, arena: Arena, extents: list[wire.Extent], images: dict[str, image.Image]
    ) -> None:
        """A few of the bits that were copied, of the parameters of which they are wanted."""
        starts = {extent.name: extent.offset for extent in extents}
        for module, (frozen, refs) in self._modules.items():
            watched = set(self._resting.watched(module))
            if not watched:
                continue
            offsets = {
                (file, key): starts[file] + offset
                for file in {ref[0] for ref in refs}
                for key, offset in zip(self._files[file], images[file].offsets, strict=True)
            }
            samples = {}
            for (name, tensor), (file, key, *_) in zip(frozen.tensors, refs, strict=True):
                if name in watched:
                    begin, length = offsets[file, key], tensor.nbytes
                    end = begin + length
                    few = min(length, _SAMPLE)
                    samples[name] = (
                        arena.mapping[begin : begin + few] + arena.mapping[end - few : end]
                    )
            self._resting.copied(module, samples)


class Layouts:
    """Where the tensors of each file lie; kept while names, types and shapes stay the same."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[Any], image.Image]] = {}

    def layout(self, file: str, tensors: dict[str, torch.Tensor]) -> image.Image:
        """A file's layout."""
        wanted: list[Any] = [(key, t.dtype, t.shape) for key, t in tensors.items()]
        known = self._known.get(file)
        if known is None or known[0] != wanted:
            known = self._known[file] = wanted, _layout(tensors)
        return known[1]


def resting_file(file: str) -> str:
    """Where the parameters of a module lie that rest."""
    return f"{file}.frozen{_ENDING}"


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors that begin at one address are the same elements."""
    return tensor is other or (
        tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor.device == other.device
        and tensor.is_conj() == other.is_conj()
        and tensor.is_neg() == other.is_neg()
    )


def _layout(tensors: dict[str, torch.Tensor]) -> image.Image:
    specs = []
    for key, tensor in tensors.items():
        length = tensor.numel() * tensor.element_size()
        dtype = _DTYPES.get(tensor.dtype)
        shape = tuple(tensor.shape) if dtype else (length,)
        specs.append(image.TensorSpec(key, dtype or "U8", shape, length))
    return image.layout(specs, {"format": "pt"})


class Reader:
    """A checkpoint, on disk or in memory. Its files were verified before.

    Args:
        files: the content of each file, writable for the sake of those who look into it.
        where: for errors.

    Raises:
        DamagedError: state.json is not what this version writes.
    """

    def __init__(self, files: dict[str, memoryview], where: str) -> None:
        self.where = where
        self._files = files
        self._places: dict[str, dict[str, image.Place]] = {}
        try:
            self.document: dict[str, Json] = msgspec.json.decode(files[STATE])
        except (KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DamagedError(f"{where}/{STATE} can't be read: {error}") from error
        if not isinstance(self.document, dict) or self.document.get("format") != FORMAT:
            found = self.document.get("format") if isinstance(self.document, dict) else None
            raise DamagedError(
                f"{where}/{STATE}: format {found!r}, expected {FORMAT} "
                "(written by another version of ckptd?)"
            )

    @classmethod
    def of_directory(cls, path: Path, files: Mapping[str, str]) -> Reader:
        """A checkpoint on disk: mapped, not read.

        Args:
            path: its directory.
            files: the names by which a rank knows its files, and those that they have there.
        """
        return cls({own: memory.mapped(path / name) for own, name in files.items()}, str(path))

    @classmethod
    def of_memory(cls, descriptor: int, table: wire.Place) -> Reader:
        """A snapshot in a memfd, which is closed.

        Raises:
            ProtocolError: there is no table at that place.
        """
        with os.fdopen(descriptor) as file:
            whole = memory.private(file.fileno())
        places = wire.places(wire.table_in(whole, table).files)
        return cls({name: whole[place] for name, place in places.items()}, "the snapshot")

    def tensor(self, ref: list[Json]) -> torch.Tensor:
        """The tensor of a reference in an entry; it shares memory with the file.

        Raises:
            DamagedError: the file does not hold it.
        """
        file, key, *odd = ref
        place = self._of(file).get(key)
        if place is None:
            raise DamagedError(f"{self.where}/{file} holds no tensor {key!r}")
        dtype = _BY_NAME[place.dtype]
        if place.end == place.begin:
            found = torch.empty(place.shape, dtype=dtype)
        else:
            content, count = self._files[file], math.prod(place.shape)
            found = torch.frombuffer(content, dtype=dtype, count=count, offset=place.begin)
            found = found.view(place.shape)
        if odd:
            found = found.clone().view(tree.dtype_of(odd[0])).reshape(odd[1])
        return found

    def _of(self, file: str) -> dict[str, image.Place]:
        if file not in self._places:
            content = self._files.get(file)
            if content is None:
                raise DamagedError(f"{self.where} holds no file {file!r}")
            try:
                self._places[file] = image.parse(content)
            except ValueError as error:
                raise DamagedError(f"{self.where}/{file}: {error}") from error
        return self._places[file]

    def frozen(self, entry: dict[str, Json]) -> Frozen:
        """An entry as if it had just been captured, independent of the files."""
        refs = entry["tensors"]
        return Frozen(entry["tree"], [(ref[1], self.tensor(ref).clone()) for ref in refs])

    def saved(self, component: dict[str, Json]) -> Saved:
        """One tracked object's state."""
        parts = component["parts"]
        return Saved(
            component["kind"],
            {part: entry["tree"] for part, entry in parts.items()},
            _lookup(self.tensor, parts),
        )

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()


def _lookup(
    tensor: Callable[[list[Json]], torch.Tensor], parts: dict[str, Json]
) -> Callable[[str, int], torch.Tensor]:
    return lambda part, number: tensor(parts[part]["tensors"][number])


def file_name(name: str) -> str:
    """A tracked object's name as the stem of a file."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
