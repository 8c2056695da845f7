"""`DistributedDataParallel`: in which order gradients are reduced.

It lays parameters out in buckets when it is made, and once more after its first iteration, in the
order in which their gradients became ready then. Buckets decide which elements are summed at which
place of a ring, and so, from three ranks on, about the last bit of the sums. A process that resumes
has made its first iteration long ago: it has to begin with the buckets of then.

It also remembers whether its last forward pass was one that gradients were reduced for: if it was
not (accumulation, `no_sync`, an evaluation), the next one leaves every rank its own buffers.

With `find_unused_parameters` it further remembers which parameters were used since gradients were
reduced the last time: those that were not keep what they have. They are told by their gradients,
which differ among ranks until they are reduced.

There is no way to set any of that. But it can be shown again: a backward pass that reaches every
parameter in the order of the record, with gradients of zero, leaves the reducer as the first
iteration has left it. It runs at the resume point, on all ranks, before anything is restored.

Sources: torch's `reducer.cpp` (`rebuild_buckets`, `push_rebuilt_params`) and `logger.cpp` (the
indices of parameters that are read here), and `DistributedDataParallel._pre_forward` and
`_post_forward`, of which the pass here makes the same calls.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ckptd.worker import tree
from ckptd.worker.tree import Json

_REBUILT: Final = "rebuilt_per_bucket_param_indices"
_READY: Final = "prev_iteration_grad_ready_order_indices"
_LOGGED_EVERY: Final = 100  # passes; torch's own default


class Replicas:
    """The `DistributedDataParallel` modules of this process, those that are made later too."""

    def __init__(self) -> None:
        # In the order in which they were seen: of two of the same parameters the newest counts.
        self._found: weakref.WeakKeyDictionary[DistributedDataParallel, None] = (
            weakref.WeakKeyDictionary()
        )
        # The young ones are asked for first: who grows old meanwhile is met twice, and not missed.
        young_first = [_wrappers(generation) for generation in range(len(gc.get_count()))]
        for wrappers in reversed(young_first):
            self._found.update(dict.fromkeys(wrappers))
        self._rebuilt: weakref.WeakKeyDictionary[DistributedDataParallel, str] = (
            weakref.WeakKeyDictionary()
        )
        register_module_module_registration_hook(self._note)

    def _note(self, parent: torch.nn.Module, name: str, child: object) -> None:  # noqa: ARG002
        if isinstance(parent, DistributedDataParallel):
            self._found[parent] = None

    def record(
        self, names: dict[int, str], tracked: Container[int], say: Callable[[str], object]
    ) -> dict[str, Json]:
        """For each, by the name of its first parameter: the buckets, or what they will follow.

        Args:
            names: `id(parameter)` -> name, of all that is tracked.
            tracked: `id(object)`, of all that is tracked.
            say: tells a person what is not exact.
        """
        found: dict[str, Json] = {}
        for key, one in self._by_key(names).items():
            for hook, state in one._comm_hooks:  # noqa: SLF001  # there is no other way to know
                if not (state is None or isinstance(state, ProcessGroup) or id(state) in tracked):
                    say(
                        f"the state of the communication hook `{hook.__qualname__}` of the "
                        f"DistributedDataParallel of {key} (a {type(state).__qualname__}) is not "
                        "carried: a resumed job begins with a fresh one. Track it: "
                        "ckptd.attach(hook_state=…)"
                    )
            # With parameters that may be unused, the buckets stay what they were at first.
            fixed = one.find_unused_parameters
            found[key] = {
                "rebuilt": "" if fixed else self._buckets(one),
                "ready": "" if fixed else _logged(one).get(_READY, ""),
                "static": bool(one.static_graph),
                "buffers": bool(one.require_forward_param_sync),
                "grads": _grads(one) if fixed and not one.require_forward_param_sync else [],
            }
        return found

    def restore(
        self, saved: dict[str, Json], names: dict[int, str], say: Callable[[str], object]
    ) -> None:
        """Make the buckets what they were; called by all ranks at the same place.

        What another rank's death does to a collective is raised as it comes: it is not the
        checkpoint's fault, and starting again helps.
        """
        by_key = self._by_key(names)
        # In the order of their names: all ranks must reduce the same at the same time.
        for key, record in sorted(saved.items()):
            one = by_key.get(key)
            order = record["rebuilt"] or record["ready"]
            if one is None:
                continue
            one.require_forward_param_sync = record["buffers"]
            if one.find_unused_parameters:  # on all ranks, whatever each of them has recorded
                one.reducer._reset_state()  # noqa: SLF001  # it may wait for a backward pass
                _show(one, _unreduced(one, record["grads"]), reduce=False)
            if not order:
                continue
            if record["static"]:
                say(
                    "DistributedDataParallel(static_graph=True) can't be given the buckets that it "
                    "had: from three ranks on, sums of gradients may differ in their last bit"
                )
                continue
            indices = [int(index) for index in order.replace(",", " ").split()]
            _show(one, indices, reduce=True)
            if record["rebuilt"]:
                one.reducer._rebuild_buckets()  # noqa: SLF001  # what the next forward begins with
            if record["rebuilt"] and self._buckets(one) != record["rebuilt"]:
                say(
                    f"the gradient buckets of the DistributedDataParallel of {key} are not what "
                    "they were: from three ranks on, sums may differ in their last bit"
                )

    def _by_key(self, names: dict[int, str]) -> dict[str, DistributedDataParallel]:
        newest = {_named(one, names): one for one in list(self._found)}
        found: dict[str, DistributedDataParallel] = {}
        # Several may begin with the same parameter: a trunk with one head, and with another one.
        for named, one in sorted(newest.items(), key=lambda item: item[0]):
            if named:
                same = sum(key.partition(" ")[0] == named[0] for key in found)
                found[f"{named[0]} #{same + 1}" if same else named[0]] = one
        return found

    def _buckets(self, one: DistributedDataParallel) -> str:
        """Which parameters are in which bucket; empty: it has not laid them out again yet."""
        known = self._rebuilt.get(one)
        if known is None:
            assert one.logger is not None, "set when it is made"
            # Else it tells what was before the last pass, and after ten passes nothing new at all.
            one._set_ddp_runtime_logging_sample_rate(1)  # type: ignore[no-untyped-call]  # noqa: SLF001
            one.logger.set_runtime_stats_and_log()
            one._set_ddp_runtime_logging_sample_rate(_LOGGED_EVERY)  # type: ignore[no-untyped-call]  # noqa: SLF001
            known = _logged(one).get(_REBUILT, "")
            if known:
                self._rebuilt[one] = known
        return known


def _wrappers(generation: int) -> list[DistributedDataParallel]:
    """Those in one of the garbage collector's generations, as they were made."""
    objects = gc.get_objects(generation)
    return [one for one in objects if issubclass(type(one), DistributedDataParallel)]


class _Link(torch.autograd.Function):
    """One of a chain: backward, it hands a zero to its parameter, and goes on to the one before."""

    @staticmethod
    def forward(ctx: Any, before: torch.Tensor, parameter: torch.Tensor, zero: Any) -> torch.Tensor:  # noqa: ARG004
        ctx.zero = zero
        return before.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, ctx.zero(), None


def _grads(one: DistributedDataParallel) -> list[int]:
    """A checksum of each parameter's gradient; 0: it has none, or one of zeros."""
    with _reduced(one) as (parameters, _):
        sums = [_checksum(parameter) for parameter in parameters]
    return [int(one) for one in torch.stack(sums).tolist()]


def _checksum(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.int64, device=parameter.device)
    bits = tree.as_bits(parameter.grad.to_dense()).reshape(-1).long()
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()


def _unreduced(one: DistributedDataParallel, sums: list[int]) -> list[int]:
    """The parameters whose gradients are not what they are on other ranks; asked by all ranks.

    A rank that has none recorded has just reduced all, and so have the others: they have only made
    a pass by themselves since, in an evaluation.
    """
    device = next(one.module.parameters()).device
    all_have = torch.tensor(int(bool(sums)), device=device)
    dist.all_reduce(all_have, dist.ReduceOp.MIN, group=one.process_group)
    if not all_have:
        return []
    least = torch.tensor(sums, device=device)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=one.process_group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=one.process_group)
    return [index for index, here in enumerate(sums) if here and bool(least[index] != most[index])]


def _show(one: DistributedDataParallel, order: list[int], *, reduce: bool) -> None:
    """A backward pass that reaches the parameters in this order."""
    with _reduced(one) as (parameters, sparse), torch.enable_grad():
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        end = torch.zeros((), device=parameters[0].device, requires_grad=True)
        for index in reversed(order):
            zero = partial(_zero, parameters[index], sparse=sparse[index])
            end = _Link.apply(end, parameters[index], zero)  # type: ignore[no-untyped-call]
        if reduce:
            one.reducer.prepare_for_forward()
            one.reducer._rebuild_buckets()  # noqa: SLF001  # the script has made a pass, maybe
            one.reducer.prepare_for_backward([])
        with _without_hooks(parameters):
            end.backward()  # type: ignore[no-untyped-call]
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad


@contextmanager
def _reduced(
    one: DistributedDataParallel,
) -> Iterator[tuple[list[torch.nn.Parameter], list[bool]]]:
    """The parameters that it reduces, and which of their gradients are sparse; indices count here.

    They are those that required gradients when it was made. Where others do by now (of two networks
    that learn in turns, one is frozen), they require them while the context lasts.
    """
    parameters, sparse = one._build_params_for_reducer()  # type: ignore[no-untyped-call]  # noqa: SLF001
    told, size = _logged(one), sum(p.numel() * p.element_size() for p in parameters)
    reduced = told["num_parameter_tensors"], told["total_parameter_size_bytes"]
    if (len(parameters), size) == reduced:
        yield parameters, sparse
        return
    buckets = one.reducer._get_zeros_like_grad_buckets()  # noqa: SLF001  # no other way tells them
    known = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    before = {parameter: parameter.requires_grad for parameter in one.module.parameters()}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in known)
    try:
        yield one._build_params_for_reducer()  # type: ignore[no-untyped-call]  # noqa: SLF001
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextmanager
def _without_hooks(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """What the script has attached to gradients is not for these; the reducer's own stay."""
    hooks = [
        kind
        for parameter in parameters
        for kind in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)  # noqa: SLF001
        if kind
    ]
    kept = [dict(kind) for kind in hooks]
    for kind in hooks:
        kind.clear()  # not replaced: their handles know them
    try:
        yield
    finally:
        for kind, before in zip(hooks, kept, strict=True):
            kind.update(before)


def _zero(parameter: torch.Tensor, *, sparse: bool) -> torch.Tensor:
    zero = torch.zeros_like(parameter)
    return zero.to_sparse(1) if sparse else zero


def _named(one: DistributedDataParallel, names: dict[int, str]) -> tuple[str, ...]:
    return tuple(names[id(p)] for p in one.module.parameters() if id(p) in names)


def _logged(one: DistributedDataParallel) -> dict[str, Any]:
    # torch's documented way to know.
    found: dict[str, Any] = one._get_ddp_logging_data()  # type: ignore[no-untyped-call]  # noqa: SLF001
    return found
