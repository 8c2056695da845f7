"""What is spread over several ranks is refused by name, not carried wrong."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from ckptd.errors import CannotCarryError
from ckptd.worker import ddp, tree
from ckptd.worker.state import ParameterNames, carrier_for


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def captured(**named: object) -> None:
    """Capture objects as `attach` does."""
    carriers = [carrier_for(name, target) for name, target in named.items()]
    for carrier in carriers:
        carrier.full(ParameterNames(carriers))


def test_fully_sharded() -> None:
    """FSDP2: a part of each parameter on each rank. Before anything is trained."""
    model = nn.Sequential(nn.Linear(4, 4))
    fully_shard(model)
    with pytest.raises(CannotCarryError, match=r"`model`: `0.weight` is a DTensor"):
        carrier_for("model", model)


def test_sharded_later() -> None:
    """What became so since is not taken for memory that it has not."""
    model = nn.Sequential(nn.Linear(4, 4))
    carrier = carrier_for("model", model)
    fully_shard(model)
    with pytest.raises(CannotCarryError, match=r"`model.*0\.weight` is a torch.*DTensor"):
        carrier.full(ParameterNames([carrier]))


def test_the_older_kind() -> None:
    """FSDP1: its state_dict gathers parameters from all ranks."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat_param = nn.Parameter(torch.zeros(4))

    model = nn.ModuleDict({"block": FullyShardedDataParallel()})
    with pytest.raises(CannotCarryError, match="`block` is a FullyShardedDataParallel"):
        carrier_for("model", model)


def test_optimizer_of_what_is_sharded() -> None:
    """Its state, too."""
    model = nn.Linear(4, 4)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(CannotCarryError, match="DTensor"):
        captured(optimizer=optimizer)


def test_a_loose_one() -> None:
    """Wherever it lies."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    value = dist.tensor.distribute_tensor(torch.ones(4), mesh, [dist.tensor.Shard(0)])
    with pytest.raises(CannotCarryError, match=r"`job\.vars\.mean` is a torch.*DTensor"):
        tree.freeze(value, "job.vars.mean")


def test_zero() -> None:
    """ZeroRedundancyOptimizer: an optimizer's state, a part on each rank."""
    model = nn.Linear(4, 4)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW)
    with pytest.raises(CannotCarryError, match="`optimizer` is a ZeroRedundancyOptimizer"):
        captured(optimizer=optimizer)


def record(said: list[str], *tracked: object) -> dict[str, object]:
    """What is recorded of the wrapped models that there are, with two named parameters."""
    names = {id(parameter): name for parameter, name in NAMES.items()}
    return ddp.Replicas().record(names, {id(one) for one in tracked}, said.append)


NAMES: dict[nn.Parameter, str] = {}


def wrapped(name: str, model: nn.Module | None = None) -> DistributedDataParallel:
    model = nn.Linear(2, 2) if model is None else model
    NAMES[next(model.parameters())] = name
    return DistributedDataParallel(model)


def test_hook_state_is_said() -> None:
    """The state of a communication hook that is not tracked is named, and only then."""
    one, said = wrapped("model.weight"), []
    state = [1]
    one.register_comm_hook(state, lambda _, bucket: bucket)
    record(said)
    assert "DistributedDataParallel of model.weight (a list) is not carried" in said[0]
    record(said, state)
    assert len(said) == 1


def test_the_newest_of_two_wrappers() -> None:
    """A model that was wrapped again: the wrapper that is used counts."""
    model = nn.Linear(2, 2)
    replicas = ddp.Replicas()
    old = wrapped("again.weight", model)
    new = DistributedDataParallel(model, static_graph=True)
    names = {id(model.weight): "again.weight"}
    (found,) = replicas.record(names, set(), print).values()
    assert (found["static"], old.static_graph, new.static_graph) == (True, False, True)


def test_the_newest_of_two_earlier_wrappers() -> None:
    """The same when both are there already."""
    model = nn.Linear(2, 2)
    old = wrapped("earlier.weight", model)
    gc.collect()
    new = DistributedDataParallel(model, static_graph=True)
    names = {id(model.weight): "earlier.weight"}
    (found,) = ddp.Replicas().record(names, set(), print).values()
    assert (found["static"], old.static_graph, new.static_graph) == (True, False, True)


def test_none_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the garbage collector moves them on, while they are looked for."""
    model = nn.Linear(2, 2)
    one = wrapped("moved.weight", model)
    listed = gc.get_objects

    def then_collected(generation: int) -> list[object]:
        found = listed(generation)
        gc.collect()
        return found

    monkeypatch.setattr(gc, "get_objects", then_collected)
    assert one in ddp.Replicas()._found
