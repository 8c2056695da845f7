"""Random generators: their state as plain values, and back, bit for bit.

`capture` and `restore` work on any generator object; `capture_global` and `restore_global` on the
process's own: `random`, `numpy.random`, torch on the CPU and torch on every CUDA device.

A state is a JSON value. Large states are base64 text of their bytes, so that one of them costs a
few microseconds, not a walk over 625 numbers.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from ckptd.errors import CannotCarryError, MismatchError
from ckptd.worker import peek

Json = Any

GENERATORS: Final = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)

#: The name under which each kind is recorded: a checkpoint is only restored into the same kind.
_KIND: Final = {
    random.Random: "random.Random",
    np.random.Generator: "numpy.random.Generator",
    np.random.RandomState: "numpy.random.RandomState",
    torch.Generator: "torch.Generator",
}


def is_generator(value: object) -> bool:
    """Whether `value` is a random generator that can be carried."""
    return isinstance(value, GENERATORS)


def kind_of(generator: object) -> str:
    """The public name of a generator's type, and for numpy that of its bit generator too."""
    for cls, name in _KIND.items():
        if isinstance(generator, cls):
            if isinstance(generator, np.random.Generator):
                return f"{name}({type(generator.bit_generator).__name__})"
            return name
    raise CannotCarryError(f"{type(generator).__qualname__} is not a random generator")


def capture(generator: object) -> Json:
    """A generator's state.

    Raises:
        CannotCarryError: a generator whose state can't be read (`random.SystemRandom`).
    """
    kind = kind_of(generator)
    if isinstance(generator, random.SystemRandom):
        raise CannotCarryError(
            "random.SystemRandom draws from the operating system and has no state to carry; "
            "use random.Random(seed)"
        )
    if isinstance(generator, random.Random):
        return {"kind": kind, "state": _python_to_json(generator.getstate())}
    if isinstance(generator, np.random.RandomState):
        return {"kind": kind, "state": _plain(generator.get_state(legacy=False))}
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        spawned = getattr(bits.seed_seq, "n_children_spawned", 0)
        return {"kind": kind, "state": _plain(bits.state), "spawned": spawned}
    assert isinstance(generator, torch.Generator)
    device = generator.device.type
    return {"kind": kind, "device": device, "state": to_text(_torch_bytes(generator.get_state()))}


def check(generator: object, saved: Json, name: str) -> None:
    """Refuse a state that is not of this generator's kind.

    Raises:
        MismatchError: names the generator, what the checkpoint holds and what was found.
    """
    found = kind_of(generator)
    if saved.get("kind") != found:
        raise MismatchError(
            f"`{name}`: the checkpoint holds the state of a {saved.get('kind')}, "
            f"the script made a {found}"
        )
    if isinstance(generator, torch.Generator) and saved["device"] != generator.device.type:
        raise MismatchError(
            f"`{name}`: the checkpoint holds a torch.Generator on {saved['device']}, "
            f"the script made one on {generator.device.type}"
        )


def restore(generator: object, saved: Json) -> None:
    """Set a generator to a captured state (`check` it first)."""
    state = saved["state"]
    if isinstance(generator, random.Random):
        generator.setstate(_python_from_json(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_unplain(state))
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = _unplain(state)
        # The number of spawned children lives in the seed sequence, which has no setter: spawning
        # the missing ones is the only way forward, and there is none back.
        missing = saved.get("spawned", 0) - getattr(bits.seed_seq, "n_children_spawned", 0)
        if missing > 0:
            bits.seed_seq.spawn(missing)  # type: ignore[attr-defined]
    else:
        assert isinstance(generator, torch.Generator)
        generator.set_state(_torch_state(to_bytes(state)))


def build(saved: Json) -> object:
    """A new generator in a captured state.

    Raises:
        MismatchError: the checkpoint names a bit generator that numpy does not have.
    """
    kind = saved["kind"]
    made: object
    if kind == "random.Random":
        made = random.Random()  # noqa: S311  # the state is set right below
    elif kind == "numpy.random.RandomState":
        made = np.random.RandomState()  # what the script used
    elif kind == "torch.Generator":
        made = torch.Generator(saved["device"])
    else:
        name = kind.removeprefix("numpy.random.Generator(").removesuffix(")")
        bits = getattr(np.random, name, None)
        if not (isinstance(bits, type) and issubclass(bits, np.random.BitGenerator)):
            raise MismatchError(f"the checkpoint holds a generator of unknown kind {kind!r}")
        made = np.random.Generator(bits())
    restore(made, saved)
    return made


# ------------------------------------------------------------------ the process's own generators


def capture_global() -> dict[str, Json]:
    """The states of `random`, `numpy.random`, torch and every CUDA device that is in use.

    A CUDA device is only asked when CUDA was initialised: asking would initialise it.
    """
    states: dict[str, Json] = {
        "random": _python_to_json(random.getstate()),
        "numpy": _plain(np.random.get_state(legacy=False)),  # the global stream
        "torch": to_text(_torch_bytes(torch.get_rng_state())),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own gap
        for index in range(torch.cuda.device_count()):
            state = torch.cuda.get_rng_state(index)
            states[f"cuda:{index}"] = to_text(_torch_bytes(state))
    return states


def restore_global(states: dict[str, Json]) -> None:
    """Set the process's own generators.

    Raises:
        MismatchError: the checkpoint has a CUDA device that this machine has not.
    """
    check_global(states)
    random.setstate(_python_from_json(states["random"]))
    np.random.set_state(_unplain(states["numpy"]))  # the global stream
    torch.set_rng_state(_torch_state(to_bytes(states["torch"])))
    for name, state in states.items():
        if name.startswith("cuda:"):
            torch.cuda.set_rng_state(_torch_state(to_bytes(state)), int(name.removeprefix("cuda:")))


def check_global(states: dict[str, Json]) -> None:
    """Refuse states of CUDA devices that are not here.

    Raises:
        MismatchError: names the device.
    """
    for name in states:
        if name.startswith("cuda:"):
            index, count = int(name.removeprefix("cuda:")), torch.cuda.device_count()
            if index >= count:
                raise MismatchError(
                    f"the checkpoint holds the random state of {name}, "
                    f"this machine has {count} CUDA device(s): its draws can't be continued exactly"
                )


# ------------------------------------------------------------------ packed, for loader workers

#: One loader worker's global states as bytes: random, numpy, torch.
Packed = tuple[bytes, bytes, bytes]


class Packer:
    """The global states of a loader worker, packed with each batch; only what changed is sent."""

    def __init__(self) -> None:
        self._readers: tuple[Callable[[], bytes], Callable[[], bytes]] | None = None
        self._last: list[bytes | None] = [None, None, None]

    def changed(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Each state that differs from the last call's; None where nothing changed."""
        if self._readers is None:  # in the worker itself, after the user's worker_init_fn
            self._readers = peek.python_reader(), peek.NumpyReader(_pack_other_numpy)
        python, numpy = self._readers
        now = (python(), numpy(), _torch_bytes(torch.get_rng_state()))
        sent = tuple(b if b != old else None for b, old in zip(now, self._last, strict=True))
        self._last = list(now)
        return sent  # type: ignore[return-value]


#: A packed state: whole, or the places and the values of the bytes that changed.
Patch = bytes | tuple[list[int], bytes]
_PATCHED_MAX: Final = 128


class Patches:
    """Packed states as what changed since the last ones.

    A draw moves a counter; the thousands of bytes beside it change once in hundreds of draws.
    """

    def __init__(self) -> None:
        self._last: list[bytes | None] = [None, None, None]

    def of(self, changed: Sequence[bytes | None]) -> tuple[Patch | None, ...]:
        """What `Packer.changed` gave, smaller."""
        patches = tuple(
            None if new is None else _patch(old, new)
            for old, new in zip(self._last, changed, strict=True)
        )
        for i, new in enumerate(changed):
            if new is not None:
                self._last[i] = new
        return patches


def _patch(old: bytes | None, new: bytes) -> Patch:
    if old is None or len(old) != len(new):
        return new
    values = np.frombuffer(new, np.uint8)
    places = np.flatnonzero(np.frombuffer(old, np.uint8) != values)
    if len(places) > _PATCHED_MAX:
        return new
    return places.tolist(), values[places].tobytes()


def patched(old: bytes | None, patch: Patch) -> bytes:
    """The state after a patch that was made against `old`."""
    if isinstance(patch, bytes):
        return patch
    assert old is not None, "a worker's first state is whole"
    state = bytearray(old)
    for place, value in zip(*patch, strict=True):
        state[place] = value
    return bytes(state)


def restore_packed(packed: Packed) -> None:
    """Set this process's global generators to what `Packer` packed."""
    python, numpy, torch_ = packed
    random.setstate(peek.unpack_python(python))
    is_twister = len(numpy) == peek.NUMPY_BYTES
    np.random.set_state(  # the global stream
        peek.unpack_numpy(numpy) if is_twister else _unplain(json.loads(numpy))
    )
    torch.set_rng_state(_torch_state(torch_))


def _pack_other_numpy() -> bytes:
    """The global numpy stream where `numpy.random.set_bit_generator` made it another kind."""
    return json.dumps(_plain(np.random.get_state(legacy=False))).encode()


# ------------------------------------------------------------------ bytes and JSON


def to_text(raw: bytes) -> str:
    """Bytes as text for a JSON value."""
    return base64.b64encode(raw).decode("ascii")


def to_bytes(text: str) -> bytes:
    """What `to_text` was given."""
    return base64.b64decode(text, validate=True)


def _torch_bytes(state: torch.Tensor) -> bytes:
    return bytes(state.numpy().tobytes())


def _torch_state(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _python_to_json(state: Any) -> Json:
    return to_text(peek.pack_python(state))


def _python_from_json(text: Json) -> Any:
    return peek.unpack_python(to_bytes(text))


def _plain(value: Any) -> Json:
    """A numpy state (nested dicts of arrays and possibly 128-bit integers) as JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "bytes": to_text(value.tobytes())}
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}  # JSON readers disagree about integers beyond 64 bits
    if isinstance(value, float):
        return {"float": value.hex()}
    raise CannotCarryError(f"a numpy generator's state holds a {type(value).__qualname__}")


def _unplain(value: Json) -> Any:
    if isinstance(value, dict):
        if set(value) == {"dtype", "bytes"}:
            return np.frombuffer(to_bytes(value["bytes"]), dtype=np.dtype(value["dtype"])).copy()
        if set(value) == {"int"}:
            return int(value["int"], 16)
        if set(value) == {"float"}:
            return float.fromhex(value["float"])
        return {key: _unplain(item) for key, item in value.items()}
    return value
