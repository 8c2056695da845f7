"""What is laid out in a snapshot's memory is read back from it, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ckptd.worker import snapshot, tree
from ckptd.worker.arena import Arenas
from ckptd.worker.resting import Resting
from ckptd.worker.snapshot import Layouts, Reader, Writer
from ckptd.worker.state import Saved


def through_memory(value: Any) -> Any:
    """A value as a resumed process gets it from a snapshot."""
    writer, arenas = Writer(Resting()), Arenas()
    entry = writer.add("value", tree.freeze(value, "value"))
    document = {"format": snapshot.FORMAT, "value": entry}
    arena, _, place = writer.write(document, [], arenas, Layouts())
    reader = Reader.of_memory(os.dup(arena.descriptor), place)
    arenas.let_go(arena)
    frozen = reader.frozen(reader.document["value"])
    return Saved.of("value", {"": frozen}).thaw(frozen.tree)


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's elements, whatever view of memory it is."""
    return tree.as_bits(tensor).contiguous().numpy().tobytes()


def test_conjugates_and_negatives() -> None:
    """A lazy conjugate or negative is not the tensor whose memory it shares."""
    base = torch.complex(torch.arange(6.0), torch.arange(6.0) - 3).view(2, 3)
    value = {
        "plain": base,
        "conj": base.conj(),
        "neg": base.conj().imag,  # a negative view
        "imag": base.imag,
        "again": base.view(2, 3),
    }
    assert value["conj"].is_conj()
    assert value["neg"].is_neg()
    back = through_memory(value)
    assert {key: bits(one) for key, one in back.items()} == {
        key: bits(one) for key, one in value.items()
    }


def test_views_of_one_memory() -> None:
    """Views at one address that differ in shape, type, or strides are each what they were."""
    base = torch.randn(4, 4)
    value = [base, base.t(), base[:2], base.view(torch.int32), base.view(16), base[:, :2], base]
    assert [bits(one) for one in through_memory(value)] == [bits(one) for one in value]


def test_an_error_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is given back, whatever went wrong, and the error is the one that comes out."""
    arenas = Arenas()
    monkeypatch.setattr(Arenas, "_worth_keeping", lambda *_: False)
    writer = Writer(Resting())
    value = [torch.rand(100_000), torch.rand(4, 4).t(), torch.rand(3, 3).t()]
    document = {"value": writer.add("value", tree.freeze(value, "value"))}
    monkeypatch.setattr(tree, "as_bits", lambda one: one.detach().to("meta"))
    with pytest.raises(NotImplementedError, match="meta") as raised:
        writer.write(document, [], arenas, Layouts())
    assert raised.traceback, "its frames are still there"
    assert not arenas._kept
