"""How each kind of tracked object is captured, checked and restored.

A `Carrier` stands for one tracked object. It gives two views of it:

- `full()`: everything, tensors by reference;
- `plain()`: only the loose values (settings of optimizer groups, train/eval flags, counters, …),
  which are set back to an *earlier* moment when a loop's item is handed out again; None where an
  object has none.

Rules:

1. `check` changes nothing and refuses everything that `restore` could not do: all objects are
   checked before the first one is restored.
2. `restore` works in place: whoever else holds the object, or a part of it, sees the restored
   value.
3. Optimizers are carried by the names of their parameters, so that groups which the script adds
   during the run come back, and nothing is ever swapped silently by a change of order.
4. State tensors keep their own dtype: `Optimizer.load_state_dict` would cast float32 moments of a
   bfloat16 parameter.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, cast

import numpy as np
import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ckptd.errors import CannotCarryError, MismatchError
from ckptd.worker import rng, tree
from ckptd.worker.tree import Frozen, Json

#: One captured object: part name -> value. The part "" is the object's own file.
Parts = dict[str, Frozen]

#: What a lookup of a parameter's public name gives: `id(parameter)` -> "model.layer.weight".
Naming = Mapping[int, str]

_CONTAINERS: Final = (
    *(list, dict, set, deque, bytearray, OrderedDict, Counter, defaultdict),
    *(torch.Tensor, np.ndarray),
)
#: Of torch's classes for what is sharded the names: importing them takes as long as all the rest.
_SPREAD: Final = "ZeroRedundancyOptimizer"
_FSDP: Final = "FullyShardedDataParallel"
_CODE: Final = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(types.ModuleType, type, staticmethod, classmethod, property),
)


_MODULE_OWN: Final = frozenset(vars(torch.nn.Module()))


class Saved:
    """One object as a checkpoint (or a moment in memory) holds it.

    Args:
        tree: part name -> JSON value.
        tensor: gives the tensor of (part name, number).
    """

    def __init__(
        self, kind: str, trees: dict[str, Json], tensor: Callable[[str, int], torch.Tensor]
    ) -> None:
        self.kind = kind
        self.trees = trees
        self._tensor = tensor

    def tensor(self, number: int, part: str = "") -> torch.Tensor:
        """The tensor of a number; it may share memory with a file."""
        return self._tensor(part, number)

    def thaw(self, value: Json, into: Any = None, part: str = "", name: str = "value") -> Any:
        """A value inside one part; see `tree.thaw`."""
        return tree.thaw(value, lambda number: self._tensor(part, number), into, name)

    def thawer(self, part: str = "", name: str = "value") -> tree.Thawer:
        """For a value that is thawed piece by piece."""
        return tree.Thawer(lambda number: self._tensor(part, number), name)

    @classmethod
    def of(cls, kind: str, parts: Parts) -> Saved:
        """What was just captured, without a way through a file."""
        return cls(
            kind,
            {part: frozen.tree for part, frozen in parts.items()},
            lambda part, number: parts[part].tensors[number][1],
        )


class Carrier(ABC):
    """One tracked object."""

    kind: str

    def __init__(self, name: str, target: Any) -> None:
        self.name = name
        self.target = target

    @abstractmethod
    def full(self, naming: Naming) -> Parts:
        """Everything that must come back.

        Raises:
            CannotCarryError: names the part that can't be carried.
        """

    def plain(self, naming: Naming) -> Frozen | None:  # noqa: ARG002  # not every kind needs it
        """The loose values alone; None: this kind has none."""
        return None

    def later(self) -> int:
        """About how many bytes `full` gains with the first step: gradients, moments."""
        return 0

    @abstractmethod
    def check(self, saved: Saved, naming: Naming) -> None:
        """Refuse what does not fit.

        Raises:
            MismatchError: names the object, what the checkpoint holds and what was found.
        """

    @abstractmethod
    def restore(self, saved: Saved, naming: Naming) -> None:
        """Overwrite the object with what was saved, in place; `check` it first."""

    def restore_plain(self, saved: Saved, naming: Naming) -> None:
        """Overwrite the loose values alone.

        Raises:
            MismatchError: they do not fit; nothing was changed.
        """
        self.check(saved, naming)
        self.restore(saved, naming)

    def refuse(self, found: str, expected: str) -> MismatchError:
        """The error for something that does not fit."""
        return MismatchError(
            f"`{self.name}` does not fit the checkpoint: it holds {expected}, "
            f"the script made {found}. Nothing was changed."
        )

    def check_kind(self, saved: Saved) -> None:
        """Refuse an object of another kind."""
        if saved.kind != self.kind:
            raise self.refuse(f"a {self.kind}", f"a {saved.kind}")


def carrier_for(name: str, target: Any) -> Carrier:
    """The carrier for an object.

    Raises:
        CannotCarryError: the object is of a kind that can't be carried; says what to do.
    """
    if isinstance(target, torch.nn.Module):
        return ModuleCarrier(name, target)
    if isinstance(target, Optimizer) and _keeps_plain_state(target):
        return OptimizerCarrier(name, target)
    if _is_a(_SPREAD, target):
        raise CannotCarryError(
            f"`{name}` is a {_SPREAD}, whose state is spread over the ranks: ckptd does not carry "
            "these yet. Use the optimizer that it wraps, with DistributedDataParallel"
        )
    if rng.is_generator(target):
        rng.capture(target)  # SystemRandom is refused here and not at the first checkpoint
        return GeneratorCarrier(name, target)
    if not isinstance(target, type) and all(
        callable(getattr(target, method, None)) for method in ("state_dict", "load_state_dict")
    ):
        return StatefulCarrier(name, target)
    if isinstance(target, _CONTAINERS):
        return ValueCarrier(name, target)
    what = f"a {type(target).__module__}.{type(target).__qualname__}"
    if isinstance(target, torch.utils.data.DataLoader):
        raise CannotCarryError(
            f"`{name}` is {what}: a loader's position is carried by iterating over "
            "`job.loop(loader)` or `job.stream(loader)`, it is not tracked"
        )
    if target is None or isinstance(target, bool | int | float | complex | str | bytes | tuple):
        raise CannotCarryError(
            f"`{name}` is {what}, which can't be changed in place when the job resumes; "
            f"keep it as `job.vars.{name}` instead"
        )
    if isinstance(target, _CODE) or _attributes(target) is None:
        raise CannotCarryError(
            f"`{name}` is {what}, which has no state that a checkpoint can hold; give it "
            "`state_dict` and `load_state_dict`, or track the values inside it"
        )
    return ObjectCarrier(name, target)


# ------------------------------------------------------------------ modules


#: Types of attributes that can be compared as they are.
_UNCHANGING: Final = (bool, int, str, type(None))
_MISSING: Final = object()


class _Members:
    """The modules and parameters under a module, each once, as they are now.

    Attributes:
        tree: what they are called and which is which; whatever changes the result of
            `named_modules` or `named_parameters` changes it, and it takes a tenth of their time.
        modules: in the order in which they were come by.
        parameters: the same.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.tree: list[object] = []
        self.modules: list[torch.nn.Module] = []
        self.parameters: list[torch.nn.Parameter] = []
        seen: set[int] = set()
        todo = [module]
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            self.modules.append(one)
            parameters, modules = one._parameters, one._modules  # noqa: SLF001  # nothing else is fast
            for names, members in ((parameters, parameters), (modules, modules)):
                self.tree += names
                self.tree += map(id, members.values())
            for parameter in parameters.values():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.parameters.append(parameter)
            todo += [child for child in modules.values() if child is not None]


class _Names:
    """What the members of a tree are called, canonically."""

    def __init__(self, module: torch.nn.Module, members: _Members) -> None:
        self.tree = members.tree
        modules = {id(one): _canonical(name) for name, one in module.named_modules()}
        parameters = {id(one): _canonical(name) for name, one in module.named_parameters()}
        self.modules = [modules[id(one)] for one in members.modules]
        self.parameters = [parameters[id(one)] for one in members.parameters]


class ModuleCarrier(Carrier):
    """A module: its state_dict under its own keys; beside it what a state_dict leaves out.

    Left out by `state_dict` and carried here: non-persistent buffers, gradients that are alive,
    train/eval flags, `requires_grad`, how a tensor lies in memory (another order of its dimensions
    is another order of additions), and plain attributes of all submodules (counters, hidden
    states, a dropout's rate). Of the attributes those are carried that a checkpoint can hold and
    that are not what they were when the module was tracked: in a resumed process they are that
    again.
    """

    kind = "module"
    target: torch.nn.Module

    def __init__(self, name: str, target: Any) -> None:
        super().__init__(name, target)
        self._names: _Names | None = None  # objects are not held on to, the script may drop them
        members, names = self._members()
        self._refuse_sharded(members, names)
        self._at_first = {
            key: tree.freeze(value, key).tree
            for key, value in self._attributes(members, names).items()
            if not _holds_tensors(value)
        }
        # Most attributes are numbers and names that never change: these are compared as they are.
        self._plain_at_first = {
            path: {key: value for key, value in vars(module).items() if type(value) in _UNCHANGING}
            for path, module in self.modules()
        }

    def _refuse_sharded(self, members: _Members, names: _Names) -> None:
        """A rank holds a part of such a parameter, and its state_dict may need all the others.

        Raises:
            CannotCarryError: names one.
        """
        modules = zip(names.modules, members.modules, strict=True)
        sharded: list[tuple[str, object]] = [(n, m) for n, m in modules if _is_a(_FSDP, m)]
        sharded += [(n, p) for n, p in _named_parameters(members, names) if tree.is_wrapper(p)]
        if sharded:
            name, one = sharded[0]
            raise CannotCarryError(
                f"`{self.name}`: `{name}` is a {type(one).__name__}: parameters that are shared "
                "out among ranks (FSDP, tensor parallelism), or put together from other tensors, "
                "can't be carried yet; those of DistributedDataParallel can. Start this script "
                "without ckptd; or, if it saves itself on a signal, without attach by "
                "`ckptd launch --flush-signal`"
            )

    @property
    def module(self) -> torch.nn.Module:
        """The user's module inside wrappers of torch.compile, DDP and DataParallel."""
        module: Any = self.target
        while True:
            if isinstance(module, DistributedDataParallel | DataParallel):
                module = module.module
            elif isinstance(inner := getattr(module, "_orig_mod", None), torch.nn.Module):
                module = inner  # torch.compile's wrapper
            else:
                return cast("torch.nn.Module", module)

    def later(self) -> int:
        trained = [p for p in self.module.parameters() if p.requires_grad and p.grad is None]
        return sum(parameter.nbytes for parameter in trained)

    def _members(self) -> tuple[_Members, _Names]:
        members = _Members(self.module)
        if self._names is None or self._names.tree != members.tree:
            self._names = _Names(self.module, members)
        return members, self._names

    def modules(self) -> list[tuple[str, torch.nn.Module]]:
        """All modules in it by canonical name, each once."""
        members, names = self._members()
        return list(zip(names.modules, members.modules, strict=True))

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """All parameters in it, the same."""
        return _named_parameters(*self._members())

    def full(self, naming: Naming) -> Parts:  # noqa: ARG002
        weights: list[tuple[str, torch.Tensor]] = []
        extra: dict[str, Any] = {}
        state = self.module.state_dict(keep_vars=True)
        for key, value in state.items():
            if _is_weight(value):
                weights.append((_canonical(key), value))
            else:
                extra[_canonical(key)] = value
        own = Frozen([key for key, _ in weights], weights)
        members, names = self._members()
        beside = {
            "flags": _flags(members, names),
            "extra": extra,
            "buffers": self._hidden_buffers(state),
            "strides": {key: _strides(t) for key, t in weights if not t.is_contiguous()},
            "grads": {
                name: parameter.grad
                for name, parameter in _named_parameters(members, names)
                if parameter.grad is not None
            },
        }
        attributes = self._changed_attributes(members, names)
        return {
            "": own,
            "beside": tree.freeze(beside, self.name),
            "attributes": tree.freeze(attributes, self.name),
        }

    def plain(self, naming: Naming) -> Frozen:  # noqa: ARG002
        members, names = self._members()
        attributes = self._changed_attributes(members, names)
        loose = {key: value for key, value in attributes.items() if not _holds_tensors(value)}
        return tree.freeze({"flags": _flags(members, names), "attributes": loose}, self.name)

    def check(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        self.check_kind(saved)
        found = {
            _canonical(key): value
            for key, value in self.module.state_dict().items()
            if _is_weight(value)
        }
        held: list[str] = saved.trees[""]
        beside = saved.thaw(saved.trees["beside"], part="beside", name=self.name)
        expected = set(held)
        missing = [key for key in held if key not in found]
        unexpected = [key for key in found if key not in expected]
        if missing or unexpected:
            raise MismatchError(
                f"`{self.name}` does not fit the checkpoint."
                + _listed(" In the checkpoint but not in the model: ", missing)
                + _listed(" In the model but not in the checkpoint: ", unexpected)
                + " Nothing was changed."
            )
        for number, key in enumerate(held):
            there, here = saved.tensor(number), found[key]
            if torch.nn.parameter.is_lazy(here):
                continue  # load_state_dict gives it its shape
            if there.shape != here.shape or there.dtype != here.dtype:
                raise self.refuse(
                    f"`{key}` as {_described(here)}", f"`{key}` as {_described(there)}"
                )
        names = {name for name, _ in self.parameters()}
        hidden = self._hidden_buffers(self.module.state_dict(keep_vars=True))
        strangers = [key for key in beside["buffers"] if key not in hidden]
        strangers += [key for key in beside["grads"] if key not in names]
        if strangers:
            raise MismatchError(
                f"`{self.name}` does not fit the checkpoint."
                + _listed(" In the checkpoint but not in the model: ", strangers)
                + " Nothing was changed."
            )

    def restore(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        actual = {_canonical(key): key for key in self.module.state_dict()}
        beside = saved.thaw(saved.trees["beside"], part="beside", name=self.name)
        state = {actual[key]: saved.tensor(n) for n, key in enumerate(saved.trees[""])}
        state |= {actual[key]: value for key, value in beside["extra"].items()}
        self.module.load_state_dict(state)
        self._restore_hidden_buffers(beside["buffers"])
        for name, parameter in self.module.named_parameters():
            parameter.grad = beside["grads"].get(_canonical(name))
        self._restore_strides(beside["strides"])
        self._restore_flags(beside["flags"])
        self._restore_attributes(saved.trees["attributes"], saved.thawer("attributes", self.name))

    def restore_plain(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        thawer, parts = saved.thawer(name=self.name), dict(_pairs(saved.trees[""]))
        self._restore_flags(thawer.thaw(parts["flags"]))
        self._restore_attributes(parts["attributes"], thawer)

    def _restore_flags(self, flags: dict[str, Any]) -> None:
        usual, others = flags["training"]
        for name, module in self.module.named_modules():
            module.training = usual if _canonical(name) not in others else not usual
        usual, others = flags["requires_grad"]
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(usual if _canonical(name) not in others else not usual)

    def _restore_strides(self, strides: dict[str, list[int] | None]) -> None:
        for key, tensor in self.module.state_dict(keep_vars=True).items():
            if not _is_weight(tensor) or _strides(tensor) is None:
                continue
            wanted = strides.get(_canonical(key), _contiguous_strides(tensor.shape))
            if wanted is not None and list(tensor.stride()) != wanted and tensor.numel():
                laid = torch.empty_strided(
                    tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device
                )
                tree.copy_bits(laid, tensor)
                tensor.data = laid

    def _attributes(
        self, members: _Members, names: _Names, *, unchanging: bool = True
    ) -> dict[str, Any]:
        """Plain attributes by "submodule.attribute"; what a checkpoint can't hold is left out.

        Args:
            members: of the module.
            names: of the members.
            unchanging: also those that are numbers and names as they were at first.
        """
        found: dict[str, Any] = {}
        for path, module in zip(names.modules, members.modules, strict=True):
            first = {} if unchanging else self._plain_at_first.get(path, {})
            for name, value in vars(module).items():
                if name in _MODULE_OWN or isinstance(value, (*_CODE, torch.nn.Module)):
                    continue
                before = first.get(name, _MISSING)
                if type(value) is type(before) and value == before:
                    continue
                with suppress(CannotCarryError):
                    tree.freeze(value, name)
                    found[f"{path}.{name}"] = value
        return found

    def _changed_attributes(self, members: _Members, names: _Names) -> dict[str, Any]:
        """Those that are not what they were when the module was tracked, and all with tensors."""
        own: set[int] = set()
        changed = {}
        for key, value in self._attributes(members, names, unchanging=False).items():
            frozen = tree.freeze(value, key)
            if frozen.tensors and not own:
                own = {
                    tensor.untyped_storage().data_ptr()
                    for tensor in (*self.module.parameters(), *self.module.buffers())
                    if _is_weight(tensor) and not torch.nn.parameter.is_lazy(tensor)
                }
            # A view of a parameter or a buffer comes back with it.
            is_view = any(
                tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in own
                for _, tensor in frozen.tensors
            )
            if not is_view and (frozen.tensors or frozen.tree != self._at_first.get(key)):
                changed[key] = value
        return changed

    def _restore_attributes(self, frozen: Json, thawer: tree.Thawer) -> None:
        modules = {_canonical(path): module for path, module in self.module.named_modules()}
        held = dict(_pairs(frozen))
        for key, entry in held.items():
            path, _, name = key.rpartition(".")
            old = vars(modules[path]).get(name)
            value = thawer.thaw(entry, old)
            if value is not old:
                setattr(modules[path], name, value)
        for key, first in self._at_first.items():
            path, _, name = key.rpartition(".")
            # What is not held was what it had been at first.
            old = vars(modules[path]).get(name)
            if key not in held and (_holds_tensors(old) or tree.freeze(old, key).tree != first):
                value = tree.thaw(first, _no_tensor, old, self.name)
                if value is not old:
                    setattr(modules[path], name, value)

    def _hidden_buffers(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Those that are not in its state_dict."""
        return {
            _canonical(name): buffer
            for name, buffer in self.module.named_buffers(remove_duplicate=False)
            if name not in state
        }

    def _restore_hidden_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        actual = {_canonical(name): name for name, _ in self.module.named_buffers()}
        for name, value in buffers.items():
            owner_name, _, leaf = actual[name].rpartition(".")
            owner = self.module.get_submodule(owner_name)
            here = getattr(owner, leaf)
            if here.shape == value.shape and here.dtype == value.dtype:
                tree.copy_bits(here, value)
            else:
                setattr(owner, leaf, value.to(here.device))


# ------------------------------------------------------------------ optimizers


def _keeps_plain_state(optimizer: Optimizer) -> bool:
    """Whether `.state` and `.param_groups` are all of it (the class overrides neither method)."""
    cls = type(optimizer)
    return (
        cls.state_dict is Optimizer.state_dict and cls.load_state_dict is Optimizer.load_state_dict
    )


def _moments(group: Mapping[str, Any]) -> int:
    """How many tensors of a parameter's size an optimizer keeps, told from its settings."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    return 1 if group.get("momentum") or "alpha" in group or "rho" in group else 0


class OptimizerCarrier(Carrier):
    """An optimizer: groups, their settings and their parameters by name; state by parameter."""

    kind = "optimizer"
    target: Optimizer

    def full(self, naming: Naming) -> Parts:
        names = self._names(naming)
        state: dict[str, Any] = {}
        loose: dict[str, Any] = {}
        for key, value in self.target.state.items():
            if isinstance(key, torch.Tensor):
                if id(key) in names:  # state of a parameter that is in no group any more: dropped
                    state[names[id(key)]] = value
            else:
                loose[str(key)] = value
        whole = {
            "type": type(self.target).__qualname__,
            "groups": self._groups(naming),
            "state": {name: dict(value) for name, value in state.items()},
            "loose": loose,
            # Of no tracked object: nobody else would carry their values.
            "parameters": {names[id(p)]: p.detach() for p in self._all() if id(p) not in naming},
        }
        return {"": tree.freeze(whole, self.name)}

    def plain(self, naming: Naming) -> Frozen:
        return tree.freeze({"groups": self._groups(naming)}, self.name)

    def check(self, saved: Saved, naming: Naming) -> None:
        self.check_kind(saved)
        held = dict(_pairs(saved.trees[""]))
        if held["type"] != type(self.target).__qualname__:
            raise self.refuse(f"a {type(self.target).__qualname__}", f"a {held['type']}")
        self._check_names(saved, naming)

    def later(self) -> int:
        if self.target.state:
            return 0
        return sum(
            _moments(group) * parameter.nbytes
            for group in self.target.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )

    def _check_names(self, saved: Saved, naming: Naming) -> None:
        groups = saved.thaw(dict(_pairs(saved.trees[""]))["groups"], name=self.name)
        known = self._parameters(naming)
        strangers = [name for group in groups for name in group["params"] if name not in known]
        if strangers:
            raise MismatchError(
                f"`{self.name}` does not fit the checkpoint."
                + _listed(" Parameters that the checkpoint knows and the script not: ", strangers)
                + " Parameters are known by name through the tracked modules: track the module "
                "that holds them. Nothing was changed."
            )

    def restore(self, saved: Saved, naming: Naming) -> None:
        known = self._parameters(naming)
        held = dict(_pairs(saved.trees[""]))
        thawer = saved.thawer(name=self.name)
        self._restore_groups(held["groups"], known, thawer)
        old: dict[Any, Any] = dict(self.target.state)
        self.target.state.clear()
        for name, entry in _pairs(held["state"]):
            parameter = known[name]
            self.target.state[parameter] = thawer.thaw(entry, old.get(parameter, {}))
        state: dict[Any, Any] = self.target.state
        for key, entry in _pairs(held["loose"]):
            state[key] = thawer.thaw(entry, old.get(key))
        for name, entry in _pairs(held["parameters"]):
            thawer.thaw(entry, known[name].detach())

    def restore_plain(self, saved: Saved, naming: Naming) -> None:
        self._check_names(saved, naming)
        held = dict(_pairs(saved.trees[""]))
        self._restore_groups(held["groups"], self._parameters(naming), saved.thawer(name=self.name))

    def _all(self) -> list[torch.Tensor]:
        return [p for group in self.target.param_groups for p in group["params"]]

    def _names(self, naming: Naming) -> dict[int, str]:
        """Public names; a parameter of no tracked module is known by its place ("0.3")."""
        return {
            id(parameter): naming.get(id(parameter), f"{g}.{p}")
            for g, group in enumerate(self.target.param_groups)
            for p, parameter in enumerate(group["params"])
        }

    def _parameters(self, naming: Naming) -> dict[str, torch.Tensor]:
        names = self._names(naming)
        own = {names[id(p)]: p for group in self.target.param_groups for p in group["params"]}
        return {**getattr(naming, "parameters", {}), **own}

    def _groups(self, naming: Naming) -> list[dict[str, Any]]:
        names = self._names(naming)
        return [
            {
                "params": [names[id(parameter)] for parameter in group["params"]],
                "settings": {key: value for key, value in group.items() if key != "params"},
            }
            for group in self.target.param_groups
        ]

    def _restore_groups(
        self, held: Json, known: dict[str, torch.Tensor], thawer: tree.Thawer
    ) -> None:
        groups = held["items"]
        live = self.target.param_groups
        del live[len(groups) :]
        while len(live) < len(groups):
            live.append({})
        for group, entry in zip(live, groups, strict=True):
            fields = dict(_pairs(entry))
            params = [known[name] for name in thawer.thaw(fields["params"])]
            settings = {key: value for key, value in group.items() if key != "params"}
            restored = thawer.thaw(fields["settings"], settings)
            group.clear()
            group.update(params=params, **restored)


# ------------------------------------------------------------------ the other kinds


class GeneratorCarrier(Carrier):
    """A random generator."""

    kind = "generator"

    def full(self, naming: Naming) -> Parts:  # noqa: ARG002
        return {"": Frozen(rng.capture(self.target), [])}

    def plain(self, naming: Naming) -> Frozen:
        return self.full(naming)[""]

    def check(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        self.check_kind(saved)
        rng.check(self.target, saved.trees[""], self.name)

    def restore(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        rng.restore(self.target, saved.trees[""])


class StatefulCarrier(Carrier):
    """Anything with `state_dict` and `load_state_dict`: schedulers, scalers, samplers, EMAs."""

    kind = "stateful"

    def full(self, naming: Naming) -> Parts:  # noqa: ARG002
        state = {
            "type": type(self.target).__qualname__,
            "state": self.target.state_dict(),
        }
        return {"": tree.freeze(state, self.name)}

    def plain(self, naming: Naming) -> Frozen | None:
        frozen = self.full(naming)[""]
        # A scheduler's learning rate may be a tensor; another object's tensors are its big state.
        return frozen if isinstance(self.target, LRScheduler) or not frozen.tensors else None

    def check(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        self.check_kind(saved)
        kind = saved.thaw(dict(_pairs(saved.trees[""]))["type"])
        if kind != type(self.target).__qualname__:
            raise self.refuse(f"a {type(self.target).__qualname__}", f"a {kind}")

    def restore(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        self.target.load_state_dict(saved.thaw(saved.trees[""], name=self.name)["state"])


class ValueCarrier(Carrier):
    """A tensor, an array or a container, restored in place."""

    kind = "value"

    def full(self, naming: Naming) -> Parts:  # noqa: ARG002
        return {"": tree.freeze(self.target, self.name)}

    def plain(self, naming: Naming) -> Frozen | None:
        if isinstance(self.target, torch.Tensor | np.ndarray):
            return None
        return self.full(naming)[""]

    def check(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        self.check_kind(saved)
        there = saved.thaw(saved.trees[""], name=self.name)
        if type(there) is not type(self.target):
            raise self.refuse(f"a {type(self.target).__name__}", f"a {type(there).__name__}")
        if isinstance(there, torch.Tensor | np.ndarray) and (
            there.shape != self.target.shape or there.dtype != self.target.dtype
        ):
            raise self.refuse(_described(self.target), _described(there))
        if isinstance(there, deque) and there.maxlen != self.target.maxlen:
            raise self.refuse(f"maxlen={self.target.maxlen}", f"maxlen={there.maxlen}")

    def restore(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        restored = saved.thaw(saved.trees[""], self.target, name=self.name)
        if restored is not self.target:
            raise self.refuse("something that can't be overwritten in place", "its elements")


class ObjectCarrier(Carrier):
    """A plain object: its attributes. Modules, optimizers and the like inside it are parts.

    Parts are carriers of their own (`job` asks for them with `parts`), named `object.attribute`.
    Functions, classes and modules are code and not state: they are left as the script made them.
    """

    kind = "object"

    def parts(self) -> dict[str, Carrier]:
        """Attributes that need a carrier of their own, by attribute name."""
        found = {}
        for name, value in (_attributes(self.target) or {}).items():
            if isinstance(value, (*_CODE, *_CONTAINERS)):
                continue
            if value is None or _is_plain_value(value):
                continue
            found[name] = carrier_for(f"{self.name}.{name}", value)
        return found

    def full(self, naming: Naming) -> Parts:  # noqa: ARG002
        return {"": tree.freeze(self._values(), self.name)}

    def plain(self, naming: Naming) -> Frozen:
        return self.full(naming)[""]

    def check(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        self.check_kind(saved)

    def restore(self, saved: Saved, naming: Naming) -> None:  # noqa: ARG002
        for name, value in saved.thaw(saved.trees[""], self._values(), name=self.name).items():
            if getattr(self.target, name, None) is not value:
                setattr(self.target, name, value)

    def _values(self) -> dict[str, Any]:
        parts = self.parts()
        return {
            name: value
            for name, value in (_attributes(self.target) or {}).items()
            if name not in parts and not isinstance(value, _CODE)
        }


# ------------------------------------------------------------------ helpers


class ParameterNames(dict[int, str]):
    """`id(parameter)` -> public name, over all that is tracked; `parameters` is the way back."""

    def __init__(self, carriers: Iterable[Carrier]) -> None:
        super().__init__()
        self.parameters: dict[str, torch.Tensor] = {}
        for carrier in carriers:
            if isinstance(carrier.target, torch.Tensor):
                self[id(carrier.target)] = carrier.name
                self.parameters[carrier.name] = carrier.target
            elif isinstance(carrier, ModuleCarrier):
                for name, parameter in carrier.parameters():
                    public = f"{carrier.name}.{name}"
                    if id(parameter) not in self:
                        self[id(parameter)] = public
                    self.parameters[public] = parameter


def _strides(tensor: torch.Tensor) -> list[int] | None:
    """A tensor's strides in elements; None where it does not fill its memory, or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return list(tensor.stride())


def _contiguous_strides(shape: torch.Size) -> list[int]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return strides


def _holds_tensors(value: Any) -> bool:
    """Whether a value has tensors or arrays in it, or can't be held at all."""
    try:
        return bool(tree.freeze(value, "").tensors)
    except CannotCarryError:
        return True


def _no_tensor(number: int) -> torch.Tensor:
    raise AssertionError(f"tensor {number} of a value that was seen to hold none")


def _is_a(name: str, target: object) -> bool:
    """Whether a class of this name is among an object's."""
    return any(one.__name__ == name for one in type(target).__mro__)


def _is_weight(value: Any) -> bool:
    """Whether a safetensors file can hold it under its own name."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and not tree.is_wrapper(value)
    )


def _canonical(key: str) -> str:
    """A state_dict key without the names that compiled submodules add."""
    if "_orig_mod" not in key:
        return key
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def _named_parameters(members: _Members, names: _Names) -> list[tuple[str, torch.nn.Parameter]]:
    return list(zip(names.parameters, members.parameters, strict=True))


def _flags(members: _Members, names: _Names) -> dict[str, Any]:
    modules = zip(names.modules, members.modules, strict=True)
    training = {name: module.training for name, module in modules}
    grads = {name: p.requires_grad for name, p in _named_parameters(members, names)}
    return {"training": _packed(training), "requires_grad": _packed(grads)}


def _packed(flags: dict[str, bool]) -> tuple[bool, set[str]]:
    """Flags as the usual one and the names of the others: thousands of equal ones cost nothing."""
    usual = sum(flags.values()) * 2 >= len(flags)
    return usual, {name for name, flag in flags.items() if flag != usual}


def _pairs(frozen: Json) -> list[tuple[str, Json]]:
    """The items of a frozen dict with string keys."""
    return [(key, value) for key, value in frozen["items"]]


def _attributes(target: Any) -> dict[str, Any] | None:
    """An object's own attributes; None when it has no place for any."""
    slots = []
    for cls in type(target).__mro__:
        own = cls.__dict__.get("__slots__", ())
        slots += [own] if isinstance(own, str) else list(own)
    slots = [slot for slot in slots if slot not in ("__dict__", "__weakref__")]
    if not hasattr(target, "__dict__") and not slots:
        return None
    values = {slot: getattr(target, slot) for slot in slots if hasattr(target, slot)}
    return {**values, **getattr(target, "__dict__", {})}


def _is_plain_value(value: Any) -> bool:
    try:
        tree.freeze(value, "")
    except CannotCarryError:
        return False
    return not rng.is_generator(value)


def _described(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _listed(text: str, names: list[str], most: int = 5) -> str:
    if not names:
        return ""
    shown = ", ".join(f"`{name}`" for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{text}{shown}{more}."
