"""What `worker/ddp.py` brings back: one model goes on, a second one is made to be as the first is.

    python forked.py 3 replicas.py CASE

Each case trains the first model, records what there is to its
wrapper, restores that into the wrapper of the second one, and makes the same pass with both: each
gradient has to be the same bit for bit. Ends with 0 if it is, in all ranks.
"""

import signal
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckptd.worker.ddp import Replicas

WIDTH, BOUND_S = 48, 60


class Net(nn.Module):
    """Used in another order than registered, so that buckets are laid out anew."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, 3)
        layers = [[nn.Linear(WIDTH, WIDTH), nn.Tanh()] for _ in range(6)]
        self.first = nn.Sequential(*[one for layer in layers for one in layer])

    def forward(self, x):
        return self.last(self.first(x))


class Half(Net):
    """A part of it is used now and then."""

    whole = True

    def forward(self, x):
        return super().forward(x) if self.whole else self.first(x)


def wrapped(module=None, **options):
    options.setdefault("bucket_cap_mb", 0.004)
    return DistributedDataParallel(Net() if module is None else module, **options)


def data():
    return torch.randn(4, WIDTH)


def trained(one, x=None):
    one.zero_grad()
    one(data() if x is None else x).square().mean().backward()
    return [p.grad.clone() for p in one.module.parameters() if p.grad is not None]


def bring_back(olds, news):
    """Make the wrappers what the others are; each of both tracked as one model."""
    for old, new in zip(olds, news, strict=True):
        new.load_state_dict(old.state_dict())
    saved = None
    for wrappers in (olds, news):
        replicas = Replicas()
        replicas._found = weakref.WeakKeyDictionary(dict.fromkeys(wrappers))
        model = nn.ModuleList([one.module for one in wrappers])
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if saved is None:
            saved = replicas.record(names, set(), print)
        else:
            replicas.restore(saved, names, no_news)


def no_news(text):
    raise AssertionError(text)


def same(old, new):
    x = data()
    for one, other in zip(trained(old, x), trained(new, x), strict=True):
        assert torch.equal(one, other)


def learns_late(rank):
    """Its output is looked at many times before it learns (a discriminator, at first)."""
    old, new = wrapped(), wrapped()
    for _ in range(12):
        old(data())
    for _ in range(3):
        trained(old)
    bring_back([old], [new])
    same(old, new)


def in_turns(rank):
    """Between its passes it is frozen, in parts or as a whole: two networks learn in turns."""
    for options in ({}, {"find_unused_parameters": True}):
        for part in ("", "first"):
            old, new = wrapped(**options), wrapped(**options)
            for _ in range(3):
                old.requires_grad_(True)
                trained(old)
                old.module.get_submodule(part).requires_grad_(False)
            with torch.no_grad():
                old(data())
            new.module.get_submodule(part).requires_grad_(False)
            before = [parameter.requires_grad for parameter in new.module.parameters()]
            bring_back([old], [new])
            assert before == [parameter.requires_grad for parameter in new.module.parameters()]
            for one in (old, new):
                one.requires_grad_(True)
            same(old, new)


def one_trunk(rank):
    """Two wrappers begin with the same parameters, and have heads of their own."""
    olds, news = ([], [])
    for wrappers in (olds, news):
        trunk = Net()
        wrappers += [wrapped(nn.Sequential(trunk, nn.Linear(3, WIDTH))) for _ in range(2)]
    for _ in range(3):
        for old in olds:
            trained(old)
    bring_back(olds, news)
    for old, new in zip(olds, news, strict=True):
        same(old, new)


def alone(rank):
    """One rank has evaluated by itself through the wrapper; there are no buffers."""
    old, new = (wrapped(find_unused_parameters=True) for _ in range(2))
    for _ in range(3):
        trained(old)
    if rank == 0:
        with torch.no_grad():
            old(data())
    bring_back([old], [new])
    same(old, new)


def warmed_up(rank):
    """Whenever it is started, the script makes a pass before it comes to its first loop."""
    for passes in (0, 3):
        old, new = wrapped(), wrapped()
        trained(old)
        trained(new)
        for _ in range(passes):
            trained(old)
        bring_back([old], [new])
        same(old, new)


def looked_at(rank):
    """Whenever it is started, the script looks at an output of which there is no backward pass."""
    olds = [wrapped(Half(), find_unused_parameters=True) for _ in range(2)]
    for one in olds:
        one(data())
        one.module.whole = False
    old, new = olds
    trained(old)
    with old.no_sync():
        trained(old)
    bring_back([old], [new])
    for parameter, other in zip(old.parameters(), new.parameters(), strict=True):
        other.grad = None if parameter.grad is None else parameter.grad.clone()
    x = data()
    for one in olds:
        one(x).square().mean().backward()
    for parameter, other in zip(old.parameters(), new.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad)


def hooked(rank):
    """The script has attached something to gradients: it sees none but its own."""
    old, new = wrapped(), wrapped()
    seen = []
    for _ in range(3):
        trained(old)
    for one in (old, new):
        for parameter in one.parameters():
            parameter.register_hook(lambda grad: seen.append(1) or grad / grad.norm())
            parameter.register_post_accumulate_grad_hook(lambda _: seen.append(2))
    bring_back([old], [new])
    assert seen == []
    same(old, new)
    assert len(seen) == 4 * len(list(old.parameters()))


def main(case):
    """One rank."""
    signal.alarm(BOUND_S)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    globals()[str(case)](rank)
