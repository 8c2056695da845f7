"""A snapshot of tensors on a GPU: what the script has computed until then, bit for bit."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from test_snapshot import bits, through_memory

from ckptd.worker import copies, tree
from ckptd.worker.arena import Arena

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

SLOW = 400_000_000  # cycles of the GPU: some tenths of a second


def slowly(device: str = "cuda") -> None:
    """Have the script's stream busy: what is asked for next is there only much later."""
    with torch.cuda.device(device):
        torch.cuda._sleep(SLOW)


def on_cpu(value: Any) -> list[bytes]:
    """The bits of tensors, when everything is done."""
    torch.cuda.synchronize()
    return [bits(tensor.resolve_conj().resolve_neg().cpu()) for tensor in value]


def test_what_the_script_has_just_asked_for() -> None:
    """A snapshot waits for the kernels before it, also for views that have to be computed."""
    base = torch.zeros(1000, 1000, dtype=torch.complex64, device="cuda")
    real = torch.zeros(1000, 1000, device="cuda")
    slowly()
    base += torch.complex(torch.rand(1000, 1000), torch.rand(1000, 1000)).cuda(non_blocking=True)
    real += 2.5
    value = [
        *(real, real.t(), real[::2, 1::3], real[:, :1].expand(1000, 5), real.bfloat16()),
        *(base, base.conj(), base.imag, base.conj().imag, base.t().conj(), base[:0]),
        torch.full((3,), float("nan"), device="cuda"),
    ]
    back = through_memory(value)
    assert [bits(one.cpu()) for one in back] == on_cpu(value)


def test_temporaries_one_after_another() -> None:
    """The memory of one tensor's temporary is not used again before it was copied."""
    torch.manual_seed(1)
    value = [torch.randn(512, 513, device="cuda").t() for _ in range(200)]
    value += [torch.randn(512, 512, dtype=torch.complex64, device="cuda").conj() for _ in range(99)]
    back = through_memory(value)
    assert [bits(one.cpu()) for one in back] == on_cpu(value)


def test_pinned_memory_that_is_being_filled() -> None:
    """A tensor that a copy from the GPU is still on its way to is waited for."""
    source = torch.rand(1 << 20, device="cuda")
    target = torch.zeros(1 << 20, pin_memory=True)
    small = torch.zeros(4, pin_memory=True)
    slowly()
    target.copy_(source, non_blocking=True)
    small.copy_(source[:4], non_blocking=True)
    back = through_memory([small, target])
    assert [bits(one) for one in back] == on_cpu([source[:4], source])


def test_a_driver_that_refuses_to_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies are right all the same, and the training's next kernel is not blamed for it."""
    runtime = torch.cuda.cudart()

    class Refusing:
        def cudaHostRegister(self, address: int, _: int, flags: int) -> Any:  # noqa: N802  # CUDA's
            return runtime.cudaHostRegister(address, 2**60, flags)  # a real error

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    value = [torch.rand(100, 100, device="cuda").t()]
    back = through_memory(value)
    torch.ones(3, device="cuda").add_(1)
    torch.cuda.synchronize()
    assert [bits(one.cpu()) for one in back] == on_cpu(value)


def test_an_error_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written any more to a memory that was given back because of an error."""
    arena = Arena(8 << 20)
    source = torch.ones(4 << 20, dtype=torch.uint8, device="cuda")
    with copies.Copies(arena) as running:
        running.add(0, source)  # pins the memory
    slowly()
    source += 1

    def half() -> None:
        with copies.Copies(arena) as running:
            running.add(0, source)
            monkeypatch.setattr(tree, "as_bits", lambda _: 1 / 0)
            running.add(4 << 20, source)

    with pytest.raises(ZeroDivisionError):
        half()
    assert arena.mapping[: 4 << 20] == b"\2" * (4 << 20)
    arena.close()


def test_pinned_once_and_given_back() -> None:
    """An arena is registered with the driver once, and closing it takes that back."""
    arena = Arena(mmap.PAGESIZE)
    value = torch.arange(16, device="cuda")
    for _ in range(2):
        with copies.Copies(arena) as running:
            running.add(0, value)
    assert arena.mapping[: value.nbytes] == bits(value.cpu())
    arena.close()
    torch.ones(3, device="cuda").add_(1)
