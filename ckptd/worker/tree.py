"""Any nest of plain values, arrays and tensors as JSON plus a list of tensors, and back.

`freeze(value)` gives a `Frozen`: a JSON value in which every tensor is a number, and the tensors by
that number. `thaw(frozen, into=...)` gives the value back.

Rules:

1. Nothing is approximated: ints stay ints as keys too, tuples stay tuples, NaN and infinities come
   back, a deque keeps its maxlen, floats are exact (JSON's shortest form reads back to the same
   bits).
2. What is mutable and exists already is restored *in place*, so that whoever else holds it sees it.
3. An object that occurs twice is one object again afterwards; a cycle is allowed.
4. A type that is not known is an error that names the path to it. Nothing is pickled.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptd.errors import CannotCarryError, MismatchError
from ckptd.worker import rng

Json = Any
_TAG: Final = "$"

#: Element types by the width of their bits, so that a copy moves bits and never converts a number.
BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_FACTORIES: Final = {"int": int, "float": float, "list": list, "dict": dict, "set": set, "str": str}
#: Most tensors, told without a search.
_OWN_MEMORY: Final = (torch.Tensor, torch.nn.Parameter)
_MAPPINGS: Final[dict[Any, str]] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_MISSING: Final = object()


_DTYPE_NAMES: Final = {
    one: str(one).removeprefix("torch.")
    for one in vars(torch).values()
    if isinstance(one, torch.dtype)
}
_DTYPES: Final = {name: one for one, name in _DTYPE_NAMES.items()}
_SURELY_MUTABLE: Final = {torch.Tensor, torch.nn.Parameter, dict, list}


class Frozen:
    """A captured value.

    Attributes:
        tree: the JSON value.
        tensors: (name, tensor) by number; a name says where in the value the tensor stood.
    """

    __slots__ = ("tensors", "tree")

    def __init__(self, tree: Json, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.tree = tree
        self.tensors = tensors


def is_wrapper(value: torch.Tensor) -> bool:
    """Whether a tensor has no memory of its own but is put together from others."""
    return type(value) not in _OWN_MEMORY and is_traceable_wrapper_subclass(value)


def freeze(value: Any, name: str) -> Frozen:
    """Capture a value. Tensors are held by reference: copy them before they change.

    Args:
        value: what to capture.
        name: what the user calls it, for errors.

    Raises:
        CannotCarryError: names the path to the value that can't be carried, and its type.
    """
    freezer = _Freezer(name)
    return Frozen(freezer.freeze(value, ""), freezer.tensors)


class _Freezer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # keeps ids from being used again while we run

    def freeze(self, value: Any, path: str) -> Json:
        if value is None or (isinstance(value, bool | str) and type(value) in (bool, str)):
            return value
        if type(value) is int:
            return value if -(2**53) < value < 2**53 else {_TAG: "int", "value": hex(value)}
        if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "value": value.hex()}
        if type(value) not in _SURELY_MUTABLE:
            immutable = self._freeze_immutable(value, path)
            if immutable is not _MISSING:
                return immutable
        if id(value) in self._seen:
            return {_TAG: "same", "as": self._seen[id(value)]}
        self._seen[id(value)] = number = len(self._kept)
        self._kept.append(value)
        frozen = self._freeze_mutable(value, path)
        frozen["#"] = number
        return frozen

    def _freeze_immutable(self, value: Any, path: str) -> Json:  # one line a type
        if type(value) is tuple:
            return {_TAG: "tuple", "items": self._items(value, path)}
        if isinstance(value, torch.Size):
            return {_TAG: "size", "items": list(value)}
        if type(value) is complex:
            return {_TAG: "complex", "value": [value.real.hex(), value.imag.hex()]}
        if type(value) is bytes:
            return {_TAG: "bytes", "value": rng.to_text(value)}
        if type(value) is frozenset:
            return {_TAG: "frozenset", "items": self._items(value, path)}
        if isinstance(value, torch.dtype):
            return {_TAG: "dtype", "value": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {_TAG: "device", "value": str(value)}
        if isinstance(value, np.generic) and value.dtype.kind in "biufcSUmM":
            return {_TAG: "scalar", "dtype": value.dtype.str, "value": rng.to_text(value.tobytes())}
        if type(value) is range:
            return {_TAG: "range", "items": [value.start, value.stop, value.step]}
        if isinstance(value, PurePath):
            return {_TAG: "path", "value": str(value)}
        return _MISSING

    def _freeze_mutable(self, value: Any, path: str) -> dict[str, Json]:  # the same
        if isinstance(value, torch.Tensor):
            return self._freeze_tensor(value, path)
        if isinstance(value, np.ndarray):
            return self._freeze_array(value, path)
        if rng.is_generator(value):
            return {_TAG: "generator", "value": rng.capture(value)}
        if type(value) is list:
            return {_TAG: "list", "items": self._items(value, path)}
        if type(value) in (dict, OrderedDict, Counter):
            return {_TAG: _MAPPINGS[type(value)], "items": self._pairs(value, path)}
        if type(value) is defaultdict:
            factory = getattr(value.default_factory, "__name__", None)
            if value.default_factory is not None and factory not in _FACTORIES:
                raise self._refusal(value.default_factory, f"{path}.default_factory")
            return {_TAG: "defaultdict", "factory": factory, "items": self._pairs(value, path)}
        if type(value) is deque:
            return {_TAG: "deque", "maxlen": value.maxlen, "items": self._items(value, path)}
        if type(value) is set:
            return {_TAG: "set", "items": self._items(value, path)}
        if type(value) is bytearray:
            return {_TAG: "bytearray", "value": rng.to_text(bytes(value))}
        raise self._refusal(value, path)

    def _items(self, values: Iterable[Any], path: str) -> list[Json]:
        return [self.freeze(item, f"{path}.{i}") for i, item in enumerate(values)]

    def _pairs(self, values: dict[Any, Any], path: str) -> list[Json]:
        return [
            [self.freeze(key, f"{path}.(key)"), self.freeze(item, f"{path}.{key}")]
            for key, item in values.items()
        ]

    def _freeze_tensor(self, value: torch.Tensor, path: str) -> dict[str, Json]:
        if is_wrapper(value):
            raise self._wrapped(value, path)
        head: dict[str, Json] = {
            "dtype": _DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "device": "cpu" if value.is_cpu else str(value.device),
        }
        if value.requires_grad and value.is_leaf:
            head["requires_grad"] = True
        if type(value) is not torch.Tensor and isinstance(value, torch.nn.Parameter):
            head["parameter"] = True
        if value.device.type == "meta" or value.is_nested:
            raise self._refusal(value, path, "a nested or meta tensor")
        if value.is_quantized:
            parts, names = self._quantised(value, path, head)
        elif value.layout is torch.sparse_coo:
            # `_indices` and not `indices`: an uncoalesced tensor stays uncoalesced
            parts = [value._indices(), value._values()]  # noqa: SLF001  # the only way to read one
            names = ["indices", "values"]
            head["coalesced"] = value.is_coalesced()
        elif value.layout is torch.sparse_csr:
            parts = [value.crow_indices(), value.col_indices(), value.values()]
            names = ["crow_indices", "col_indices", "values"]
        elif value.layout is torch.strided:
            parts, names = [value], [""]
            if value.dim() > 1 and not value.is_contiguous() and _is_dense(value):
                head["strides"] = list(value.stride())
        else:
            raise self._refusal(value, path, f"a tensor of layout {value.layout}")
        head["parts"] = []
        for part, suffix in zip(parts, names, strict=True):
            head["parts"].append(len(self.tensors))
            name = f"{path}.{suffix}" if suffix else path
            self.tensors.append((name.lstrip(".") or "value", part.detach()))
        layout = "strided" if value.layout is torch.strided else str(value.layout)
        return {_TAG: "tensor", "layout": layout.removeprefix("torch."), **head}

    def _quantised(
        self, value: torch.Tensor, path: str, head: dict[str, Json]
    ) -> tuple[list[torch.Tensor], list[str]]:
        """A quantised tensor's integers, and what they stand for."""
        if value.qscheme() is torch.per_tensor_affine:
            head["scale"], head["zero_point"] = value.q_scale(), value.q_zero_point()
            return [value.int_repr()], [""]
        if value.qscheme() is torch.per_channel_affine:
            head["axis"] = value.q_per_channel_axis()
            parts = [value.q_per_channel_scales(), value.q_per_channel_zero_points()]
            return [value.int_repr(), *parts], ["", "scales", "zero_points"]
        raise self._refusal(value, path, f"a tensor quantised as {value.qscheme()}")

    def _freeze_array(self, value: np.ndarray[Any, Any], path: str) -> dict[str, Json]:
        if value.dtype.hasobject:
            raise self._refusal(value, path, f"a numpy array of {value.dtype}")
        # A view of its bytes and no copy where memory order allows it.
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        number = len(self.tensors)
        self.tensors.append((path.lstrip(".") or "value", _tensor_of(flat)))
        fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        return {
            _TAG: "array",
            "dtype": value.dtype.str if value.dtype.names is None else value.dtype.descr,
            "shape": list(value.shape),
            "order": "F" if fortran else "C",
            "parts": [number],
        }

    def _wrapped(self, value: torch.Tensor, path: str) -> CannotCarryError:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return CannotCarryError(
            f"`{self.name}{path}` is a {kind}, a tensor that is put together from others (a part "
            "of it on each rank, as FSDP, tensor parallelism and DTensor have it): ckptd does not "
            "carry these yet. Use DistributedDataParallel, or take it out of what is tracked"
        )

    def _refusal(self, value: object, path: str, what: str | None = None) -> CannotCarryError:
        what = what or f"a {type(value).__module__}.{type(value).__qualname__}"
        where = f"`{self.name}`" if not path else f"`{self.name}{path}`"
        return CannotCarryError(
            f"{where} is {what}, which a checkpoint can't hold. It can hold None, numbers, "
            "strings, bytes, tuples, lists, dicts, sets, deques, Counters, arrays, tensors and "
            "random generators; give the object `state_dict` and `load_state_dict`, or track its "
            "parts."
        )


def thaw(
    tree: Json,
    tensor: Callable[[int], torch.Tensor],
    into: Any = _MISSING,
    name: str = "value",
) -> Any:
    """The value that was frozen.

    Args:
        tree: `Frozen.tree`.
        tensor: gives the tensor of a number; it may share memory with a file and is copied.
        into: an existing value; what is mutable in it is restored in place.
        name: what the user calls it, for errors.

    Raises:
        MismatchError: a tree that no `freeze` has written.
    """
    return Thawer(tensor, name).thaw(tree, into)


class Thawer:
    """Thaws several parts of one frozen value, in the order in which they were frozen.

    One thawer for all parts: an object that occurs in two of them is one object again.
    """

    def __init__(self, tensor: Callable[[int], torch.Tensor], name: str) -> None:
        self._tensor = tensor
        self._name = name
        self._seen: dict[int, Any] = {}

    def thaw(self, tree: Json, into: Any = _MISSING) -> Any:
        """See the function `thaw`."""
        if not isinstance(tree, dict):
            return tree
        kind = tree.get(_TAG)
        if kind == "same":
            return self._seen[tree["as"]]
        immutable = self._thaw_immutable(kind, tree, into)
        return self._thaw_mutable(kind, tree, into) if immutable is _MISSING else immutable

    def _thaw_immutable(self, kind: str | None, tree: dict[str, Json], into: Any) -> Any:
        if kind == "int":
            return int(tree["value"], 16)
        if kind == "float":
            return float.fromhex(tree["value"])
        if kind == "tuple":
            old = into if type(into) is tuple and len(into) == len(tree["items"]) else None
            return tuple(
                self.thaw(item, old[i] if old is not None else _MISSING)
                for i, item in enumerate(tree["items"])
            )
        if kind == "size":
            return torch.Size(tree["items"])
        if kind == "complex":
            return complex(*(float.fromhex(part) for part in tree["value"]))
        if kind == "bytes":
            return rng.to_bytes(tree["value"])
        if kind == "frozenset":
            return frozenset(self.thaw(item) for item in tree["items"])
        if kind == "dtype":
            return dtype_of(tree["value"])
        if kind == "device":
            return torch.device(tree["value"])
        if kind == "scalar":
            return np.frombuffer(rng.to_bytes(tree["value"]), dtype=np.dtype(tree["dtype"]))[0]
        if kind == "range":
            return range(*tree["items"])
        if kind == "path":
            return Path(tree["value"])
        return _MISSING

    def _thaw_mutable(self, kind: str | None, tree: dict[str, Json], into: Any) -> Any:
        number = tree["#"]
        if kind == "tensor":
            self._seen[number] = made = self._thaw_tensor(tree, into)
            return made
        if kind == "array":
            self._seen[number] = array = self._thaw_array(tree, into)
            return array
        if kind == "generator":
            return self._thaw_generator(number, tree["value"], into)
        if kind == "bytearray":
            value = into if type(into) is bytearray else bytearray()
            value[:] = rng.to_bytes(tree["value"])
            self._seen[number] = value
            return value
        if kind in ("list", "deque", "set"):
            return self._thaw_collection(kind, tree, into)
        if kind in ("dict", "ordered", "counter", "defaultdict"):
            return self._thaw_mapping(kind, tree, into)
        raise MismatchError(
            f"`{self._name}`: the checkpoint holds a value of unknown kind {kind!r}"
        )

    def _thaw_generator(self, number: int, saved: Json, into: Any) -> Any:
        if rng.is_generator(into) and rng.kind_of(into) == saved["kind"]:
            rng.restore(into, saved)
            self._seen[number] = into
            return into
        self._seen[number] = made = rng.build(saved)
        return made

    def _thaw_collection(self, kind: str, tree: dict[str, Json], into: Any) -> Any:
        items = tree["items"]
        value: Any
        if kind == "deque":
            same = type(into) is deque and into.maxlen == tree["maxlen"]
            value = into if same else deque(maxlen=tree["maxlen"])
        else:
            cls = {"list": list, "set": set}[kind]
            value = into if type(into) is cls else cls()
        self._seen[tree["#"]] = value
        old = list(value) if kind != "set" and len(value) == len(items) else None
        new = [self.thaw(x, _MISSING if old is None else old[i]) for i, x in enumerate(items)]
        value.clear()
        (value.update if kind == "set" else value.extend)(new)
        return value

    def _thaw_mapping(self, kind: str, tree: dict[str, Json], into: Any) -> Any:
        cls = {"dict": dict, "ordered": OrderedDict, "counter": Counter, "defaultdict": defaultdict}
        value: Any = into if type(into) is cls[kind] else cls[kind]()
        if kind == "defaultdict":
            value.default_factory = _FACTORIES[tree["factory"]] if tree["factory"] else None
        self._seen[tree["#"]] = value
        old = dict(value)
        new = []
        for key_tree, item_tree in tree["items"]:
            key = self.thaw(key_tree)
            new.append((key, self.thaw(item_tree, old.get(key, _MISSING))))
        value.clear()
        for key, item in new:
            value[key] = item
        return value

    def _thaw_tensor(self, tree: dict[str, Json], into: Any) -> torch.Tensor:
        parts = [self._tensor(number) for number in tree["parts"]]
        shape, dtype = tree["shape"], dtype_of(tree["dtype"])
        if "scale" in tree or "axis" in tree:
            return _quantised_again(tree, [part.clone() for part in parts])
        if tree["layout"] == "sparse_coo":
            made = torch.sparse_coo_tensor(
                parts[0].clone(),
                parts[1].clone(),
                shape,
                is_coalesced=tree["coalesced"],
                check_invariants=True,  # indices out of range would be read out of range
            ).to(tree["device"])
        elif tree["layout"] == "sparse_csr":
            rows, columns, values = (part.clone() for part in parts)
            made = torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=True)
            made = made.to(tree["device"])
        else:
            source = parts[0]
            if list(source.shape) != shape or source.dtype != dtype:
                # Before memory is asked for: what is written there may be anything.
                raise MismatchError(
                    f"`{self._name}`: a tensor of {dtype} {shape} is stored as one of "
                    f"{source.dtype} {list(source.shape)}"
                )
            if _fits(into, source, tree["device"]):
                copy_bits(into, source)
                return into  # type: ignore[no-any-return]  # _fits saw that it is a tensor
            strides = tree.get("strides")
            made = (
                torch.empty_strided(shape, strides, dtype=dtype, device=tree["device"])
                if strides
                else torch.empty(shape, dtype=dtype, device=tree["device"])
            )
            copy_bits(made, source)
        if tree.get("parameter"):
            return torch.nn.Parameter(made, requires_grad=bool(tree.get("requires_grad")))
        return made.requires_grad_() if tree.get("requires_grad") else made

    def _thaw_array(self, tree: dict[str, Json], into: Any) -> np.ndarray[Any, Any]:
        described = tree["dtype"]
        dtype = np.dtype(
            described
            if isinstance(described, str)
            else [tuple(tuple(x) if isinstance(x, list) else x for x in f) for f in described]
        )
        raw = self._tensor(tree["parts"][0]).numpy()
        made = raw.view(dtype).reshape(tree["shape"])
        if (
            isinstance(into, np.ndarray)
            and into.dtype == dtype
            and into.shape == made.shape
            and into.flags.writeable
        ):
            into[...] = made
            return into
        return made.copy(order=tree["order"])


def dtype_of(name: str) -> torch.dtype:
    """The element type of a name.

    Raises:
        MismatchError: there is none.
    """
    if name not in _DTYPES:
        raise MismatchError(f"the checkpoint names an element type {name!r}, which torch has not")
    return _DTYPES[name]


def _quantised_again(tree: dict[str, Json], parts: list[torch.Tensor]) -> torch.Tensor:
    # torch has no public way from integers; through floats they would be rounded once more.
    if "scale" in tree:
        made = torch._make_per_tensor_quantized_tensor(  # noqa: SLF001
            parts[0], tree["scale"], tree["zero_point"]
        )
    else:
        values, scales, zeros = parts
        made = torch._make_per_channel_quantized_tensor(  # noqa: SLF001
            values, scales, zeros, tree["axis"]
        )
    return made.to(tree["device"])


def copy_bits(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor's elements bit for bit; strides and device are the target's."""
    if target.dtype != source.dtype or target.shape != source.shape:
        raise MismatchError(
            f"a tensor of {source.dtype} {list(source.shape)} into one of "
            f"{target.dtype} {list(target.shape)}"
        )
    target, source = as_bits(target), as_bits(source)
    with torch.no_grad():
        target.copy_(source)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory seen as integers, so that no copy can touch a NaN's payload."""
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(BITS[tensor.element_size()])


def _fits(into: Any, source: torch.Tensor, device: str) -> bool:
    """Whether an existing tensor can take the elements in place."""
    return (
        isinstance(into, torch.Tensor)
        and into.layout is torch.strided
        and into.dtype == source.dtype
        and into.shape == source.shape
        and into.device.type == torch.device(device).type
        and not into.is_conj()
        and not into.is_neg()
        and _is_dense(into)
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether no two elements share memory (an expanded tensor's do)."""
    return all(s != 0 or n == 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _tensor_of(flat: np.ndarray[Any, Any]) -> torch.Tensor:
    if not flat.flags.writeable:
        flat = flat.copy()
    return torch.from_numpy(flat)
