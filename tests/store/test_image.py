"""The layout of a safetensors file, read back by safetensors itself."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.store import image
from ckptd.store.image import TensorSpec, layout

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(max_size=20).filter(lambda name: name != "__metadata__" and is_unicode(name))


def is_unicode(name: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in name)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, tuple[TensorSpec, bytes]]:
    """Tensors by name, with any bits (booleans are 0 or 1)."""
    made = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=8)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(SHAPES)
        length = math.prod(shape) * DTYPES[dtype].itemsize
        bits = draw(st.binary(min_size=1, max_size=64))
        content = (bits * (length // len(bits) + 1))[:length]
        if dtype == "BOOL":
            content = bytes(byte & 1 for byte in content)
        made[name] = TensorSpec(name, dtype, shape, length), content
    return made


def written(tensors: list[tuple[TensorSpec, bytes]]) -> bytes:
    laid = layout([spec for spec, _ in tensors], {"by": "a test"})
    file = bytearray(laid.length)
    file[: len(laid.header)] = laid.header
    for (_, content), offset in zip(tensors, laid.offsets, strict=True):
        file[offset : offset + len(content)] = content
    return bytes(file)


def bits_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@settings(deadline=None)
@given(contents(), st.randoms(use_true_random=False))
def test_safetensors_reads_what_was_laid_out(
    made: dict[str, tuple[TensorSpec, bytes]], chance
) -> None:
    """Every tensor comes back with its type, shape and bits, in whatever order it was given."""
    tensors = list(made.values())
    chance.shuffle(tensors)
    read = safetensors.torch.load(written(tensors))
    assert set(read) == set(made)
    for name, (spec, content) in made.items():
        assert read[name].dtype == DTYPES[spec.dtype]
        assert tuple(read[name].shape) == spec.shape
        assert bits_of(read[name]) == content


@settings(deadline=None)
@given(contents())
def test_tensors_are_aligned_and_without_gaps(made: dict[str, tuple[TensorSpec, bytes]]) -> None:
    """Each tensor begins at a multiple of its element's size, the first at one of 64; together
    they fill the file."""
    specs = [spec for spec, _ in made.values()]
    laid = layout(specs)
    assert len(laid.header) % 64 == 0
    at = len(laid.header)
    for offset, length in sorted(
        (offset, spec.length) for offset, spec in zip(laid.offsets, specs, strict=True)
    ):
        assert offset == at
        at += length
    assert at == laid.length
    for offset, spec in zip(laid.offsets, specs, strict=True):
        assert offset % DTYPES[spec.dtype].itemsize == 0


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (3, 5)])
def test_every_type_and_odd_shape(dtype: str, shape: tuple[int, ...]) -> None:
    """Each type comes back as itself: a single number, an empty tensor, an odd number of them."""
    content = bytes(i % 2 for i in range(math.prod(shape) * DTYPES[dtype].itemsize))
    spec = TensorSpec("t", dtype, shape, len(content))
    read = safetensors.torch.load(written([(spec, content)]))["t"]
    assert (read.dtype, tuple(read.shape), bits_of(read)) == (DTYPES[dtype], shape, content)


def test_the_element_sizes_are_torchs() -> None:
    """The table covers the types of this suite, with torch's sizes."""
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == image.ELEMENT_BYTES


def test_no_tensors_at_all() -> None:
    """A file without tensors is a file that safetensors reads."""
    assert safetensors.torch.load(written([])) == {}


def test_two_tensors_of_one_name_are_refused() -> None:
    """One of them would be lost without a word."""
    spec = TensorSpec("t", "U8", (1,), 1)
    with pytest.raises(ValueError, match="one name"):
        layout([spec, spec])


def test_the_metadatas_name_is_refused() -> None:
    """A tensor called as the header calls its metadata would make a file that nobody reads."""
    with pytest.raises(ValueError, match="__metadata__"):
        layout([TensorSpec("__metadata__", "U8", (1,), 1)])


@pytest.mark.parametrize(
    ("dtype", "shape", "length"),
    [("F32", (2, 3), 23), ("F32", (2, 3), 6), ("U8", (), 0), ("U8", (0,), 1), ("I64", (1,), 16)],
)
def test_a_wrong_length_is_refused(dtype: str, shape: tuple[int, ...], length: int) -> None:
    """The error names the tensor, its type, its shape and the length."""
    with pytest.raises(ValueError, match=f"weights: {dtype} .* not {length} bytes"):
        layout([TensorSpec("weights", dtype, shape, length)])
