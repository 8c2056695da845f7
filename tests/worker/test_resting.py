"""Which parameters are kept apart, from what is seen of them at each snapshot."""

from __future__ import annotations

import torch
from torch import nn

from ckptd.worker import tree
from ckptd.worker.arena import Arenas
from ckptd.worker.resting import Resting
from ckptd.worker.snapshot import Layouts, Writer
from ckptd.worker.tree import Frozen


class Watched:
    """A job's modules, of which snapshots are taken."""

    def __init__(self, **modules: nn.Module) -> None:
        self.modules = modules
        self.resting = Resting()
        self.arenas, self.layouts = Arenas(), Layouts()

    def snapshot(self) -> set[str]:
        """Take one; what lies apart in it."""
        writer = Writer(self.resting)
        apart = set()
        for name, module in self.modules.items():
            tensors = list(module.state_dict(keep_vars=True).items())
            entry = writer.add(name, Frozen([key for key, _ in tensors], tensors), own=True)
            apart |= {
                f"{name}.{key}"
                for file, key in entry["tensors"]
                if file == f"{name}.frozen.safetensors"
            }
        arena, _, _ = writer.write({}, [], self.arenas, self.layouts)
        self.arenas.let_go(arena)
        return apart


def moved(*parameters: torch.Tensor) -> None:
    """One step of training."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)


def small(*, buffers: bool = False) -> nn.Module:
    """Two layers, maybe with buffers between them."""
    middle = nn.BatchNorm1d(2, affine=False) if buffers else nn.ReLU()
    return nn.Sequential(nn.Linear(2, 2, bias=False), middle, nn.Linear(2, 2, bias=False))


def test_an_ordinary_model_has_one_file() -> None:
    """Before the first step, between steps, and with buffers."""
    model = small(buffers=True)
    watched = Watched(model=model)
    for _ in range(3):
        assert not watched.snapshot()
    for _ in range(3):
        moved(*model.parameters())
        assert not watched.snapshot()
        assert not watched.snapshot()


def test_what_stands_still_while_others_move() -> None:
    """It is kept apart from then on, until it moves; then never again."""
    model = small()
    watched = Watched(model=model)
    assert not watched.snapshot()
    seen = []
    for _ in range(3):
        moved(model[2].weight)
        seen.append(watched.snapshot())
    assert seen == [{"model.0.weight"}] * 3
    moved(model[0].weight)
    for _ in range(3):
        assert not watched.snapshot()


def test_turned_off() -> None:
    """A frozen backbone is kept apart at once, and so is one that is frozen in mid-training."""
    model = small()
    watched = Watched(model=model)
    model[0].requires_grad_(requires_grad=False)
    assert watched.snapshot() == {"model.0.weight"}
    assert watched.snapshot() == {"model.0.weight"}
    moved(model[2].weight)
    assert watched.snapshot() == {"model.0.weight"}
    later = small()
    watched = Watched(model=later)
    watched.snapshot()
    moved(*later.parameters())
    assert not watched.snapshot()
    later[0].requires_grad_(requires_grad=False)
    moved(later[2].weight)
    assert watched.snapshot() == {"model.0.weight"}


def test_turned_on_and_off_in_turn() -> None:
    """As a GAN's halves are: where they lie changes once or twice, and then no more."""
    model = small()
    watched = Watched(model=model)
    seen = []
    for step in range(20):
        on, off = (model[0], model[2]) if step % 2 else (model[2], model[0])
        on.requires_grad_(requires_grad=True)
        off.requires_grad_(requires_grad=False)
        moved(on.weight)
        seen.append(watched.snapshot())
    assert len({frozenset(apart) for apart in seen[-14:]}) == 1, seen


def test_changed_by_the_script() -> None:
    """A parameter that is not trained and moves (a codebook, an average) is not kept apart."""
    model = small()
    model[0].requires_grad_(requires_grad=False)
    watched = Watched(model=model)
    seen = []
    model.register_parameter("trained", nn.Parameter(torch.ones(3)))
    for _ in range(5):
        moved(*model.parameters())
        seen.append(watched.snapshot())
    assert seen[3:] == [set()] * 2


def test_written_over_with_the_same() -> None:
    """A frozen backbone rests though its bits are swapped out and in again at each evaluation."""
    model = small()
    model[0].requires_grad_(requires_grad=False)
    watched = Watched(model=model)
    for _ in range(3):
        moved(model[2].weight)
        model.load_state_dict({key: one.clone() for key, one in model.state_dict().items()})
        assert watched.snapshot() == {"model.0.weight"}


def test_an_average_without_versions() -> None:
    """Changes through `.data` are not counted by torch: a sample of the bits shows them."""
    model, average = small(buffers=True), small(buffers=True)
    watched = Watched(model=model, average=average)
    seen = []
    for _ in range(5):
        moved(*model.parameters())
        for parameter in average.parameters():
            parameter.data.mul_(0.9)
        seen.append(watched.snapshot())
    assert seen[3:] == [set()] * 2, seen


def test_a_module_that_rests_whole() -> None:
    """There is nothing to keep apart; with buffers that move there is."""
    model = small()
    watched = Watched(model=model, still=small(), busy=small(buffers=True))
    for _ in range(3):
        moved(*model.parameters())
        apart = watched.snapshot()
    assert apart == {"busy.0.weight", "busy.2.weight"}


def test_one_kept_apart_stays_so_when_the_rest_pauses() -> None:
    """A backbone is not mixed with its head because the head made a pause."""
    model, other = small(), small()
    model[0].requires_grad_(requires_grad=False)
    watched = Watched(model=model, other=other)
    for _ in range(4):
        moved(*other.parameters())
        assert watched.snapshot() == {"model.0.weight"}
    moved(model[2].weight)
    assert watched.snapshot() == {"model.0.weight"}


def test_resumed() -> None:
    """What the checkpoint kept apart is so at once, and what moved there is not."""
    model = small()
    model[2].requires_grad_(requires_grad=False)
    watched = Watched(model=model)
    watched.resting.expect("model", {"0.weight"}, {"2.weight"})
    for _ in range(3):
        assert watched.snapshot() == {"model.0.weight"}
        moved(model[2].weight)
    moved(model[0].weight)
    assert not watched.snapshot()


def test_odd_parameters() -> None:
    """Empty ones, ties and those made in inference mode."""
    model = small()
    with torch.inference_mode():
        model.register_parameter("inferred", nn.Parameter(torch.ones(3), requires_grad=False))
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    model.register_parameter("tied", model[0].weight)
    watched = Watched(model=model)
    for _ in range(3):
        moved(model[2].weight)
        apart = watched.snapshot()
    assert apart == {f"model.{key}" for key in ("inferred", "empty", "tied", "0.weight")}
    assert tree.as_bits(model.empty).numel() == 0
