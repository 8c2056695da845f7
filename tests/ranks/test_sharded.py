"""Parameters of which each rank holds a part are refused, by name: their bits are not in reach."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckptd.errors import CannotCarryError
from ckptd.worker.resting import Resting
from ckptd.worker.snapshot import Writer
from ckptd.worker.state import ParameterNames, carrier_for


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.usefixtures("group")
def test_at_attach() -> None:
    """Before anything is trained, with the parameter's name."""
    with pytest.raises(CannotCarryError, match=r"`model`: `0.weight` is a DTensor"):
        carrier_for("model", sharded(nn.Sequential(nn.Linear(4, 4))))


@pytest.mark.usefixtures("group")
def test_at_a_snapshot() -> None:
    """What became so later is not taken for memory that it has not."""
    model = nn.Sequential(nn.Linear(4, 4))
    carrier = carrier_for("model", model)
    sharded(model)
    writer = Writer(Resting())
    frozen = carrier.full(ParameterNames([carrier]))[""]
    with pytest.raises(CannotCarryError, match=r"`0.weight` in model.* is a DTensor"):
        writer.add("model", frozen, own=True)


def test_the_older_kind() -> None:
    """Its state_dict gathers parameters from all ranks."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat_param = nn.Parameter(torch.zeros(4))

    model = nn.ModuleDict({"block": FullyShardedDataParallel()})
    with pytest.raises(CannotCarryError, match="`block` is a FullyShardedDataParallel"):
        carrier_for("model", model)
