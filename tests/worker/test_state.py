"""Values, generators and tracked objects come back as they were, bit for bit."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptd
from ckptd.errors import CannotCarryError, UsageError
from ckptd.worker import rng, tree
from ckptd.worker.job import Job, _CheckedVars
from ckptd.worker.state import ParameterNames, Saved, carrier_for

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(allow_nan=False),
)
keys = st.one_of(st.integers(), st.text(), st.booleans(), st.tuples(st.integers(), st.text()))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.dictionaries(keys, inner),
        st.tuples(inner, inner),
        st.lists(inner).map(lambda x: deque(x, maxlen=7)),
        st.sets(st.integers()),
        st.frozensets(st.text()),
    ),
    max_leaves=20,
)


def through_json(value: object, into: object = None) -> object:
    frozen = tree.freeze(value, "value")
    again = msgspec.json.decode(msgspec.json.encode(frozen.tree))
    return tree.thaw(again, lambda number: frozen.tensors[number][1], into)


def same(a: object, b: object) -> bool:
    """Equal in type and value, NaN and the sign of zero included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex() or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(x, y) for x, y in zip(a.values(), b.values()))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@given(values)
def test_values(value: object) -> None:
    """Every nest of plain values comes back through JSON with its types, keys and order."""
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "value", [Counter("abca"), OrderedDict(b=1, a=2), defaultdict(list, {1: [2]}), 2**200, -(2**70)]
)
def test_containers_of_the_library(value: object) -> None:
    """Counters, ordered and default dicts, and integers of any size."""
    again = through_json(value)
    assert type(again) is type(value)
    assert again == value


def test_identity_is_kept() -> None:
    """What exists is restored in place, and what was one object twice is one object again."""
    inner = [1, 2]
    value = {"a": inner, "b": inner}
    live_inner: list[int] = []
    live = {"a": live_inner, "b": live_inner, "stale": 1}
    again = through_json(value, live)
    assert again is live
    assert live == value
    assert live["a"] is live_inner is live["b"]


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.complex64, torch.complex128, torch.bool, torch.int8, torch.uint8),
    *(torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Random bits of every element type, as 0-dim, empty and in place as well as anew."""
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    value = bits.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    assert raw(through_json(value)) == raw(value)
    live = torch.zeros(shape, dtype=dtype)
    assert through_json(value, live) is live
    assert raw(live) == raw(value)


def test_strides_are_kept() -> None:
    """A dense tensor in another memory order comes back in that order: matmuls depend on it."""
    value = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    again = through_json(value)
    assert again.stride() == value.stride()
    assert torch.equal(again, value)


def test_sparse() -> None:
    """Sparse tensors, an uncoalesced one too."""
    coo = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 3.0], (4,))
    again = through_json(coo)
    assert not again.is_coalesced()
    assert torch.equal(again.to_dense(), coo.to_dense())
    csr = torch.eye(3).to_sparse_csr()
    assert torch.equal(through_json(csr).to_dense(), torch.eye(3))


GENERATORS = [
    lambda: random.Random(1),
    lambda: np.random.RandomState(1),
    lambda: torch.Generator().manual_seed(1),
    *(
        lambda bits=bits: np.random.Generator(bits(1))
        for bits in (
            *(np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937),
            *(np.random.Philox, np.random.SFC64),
        )
    ),
]


def draw(generator: object) -> list[float]:
    if isinstance(generator, torch.Generator):
        return torch.randn(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.random(), generator.gauss(0, 1), generator.random()]
    return [*generator.random(2), generator.standard_normal()]


@pytest.mark.parametrize("make", GENERATORS)
def test_generators(make) -> None:
    """Each kind of generator goes on where it was, in place and built anew, half-used pairs too."""
    generator = make()
    draw(generator)
    saved = msgspec.json.decode(msgspec.json.encode(rng.capture(generator)))
    expected = draw(generator)
    rng.restore(generator, saved)
    assert draw(generator) == expected
    assert draw(rng.build(saved)) == expected


def test_spawned_generators() -> None:
    """A numpy generator spawns the children that it would have spawned."""
    generator = np.random.default_rng(1)
    generator.spawn(3)
    saved = rng.capture(generator)
    expected = generator.spawn(1)[0].random()
    fresh = np.random.default_rng(1)
    rng.restore(fresh, saved)
    assert fresh.spawn(1)[0].random() == expected


def test_packed_states() -> None:
    """What a loader's worker sends brings its three streams back."""
    random.gauss(0, 1)
    np.random.standard_normal()
    packed = rng.Packer().changed()
    expected = random.gauss(0, 1), np.random.standard_normal(), torch.rand(1).item()
    rng.restore_packed(packed)
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.rand(1).item()) == expected


def test_bfloat16_moments_stay_float32() -> None:
    """`load_state_dict` would cast the moments to the parameter's type; the carrier does not."""
    model = torch.nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        moment = torch.randn(parameter.shape, dtype=torch.float32)
        optimizer.state[parameter]["momentum_buffer"] = moment
    naming = ParameterNames([carrier_for("model", model)])
    carrier = carrier_for("optimizer", optimizer)
    parts = carrier.full(naming)
    expected = [raw(tensor) for _, tensor in parts[""].tensors]
    saved = Saved.of("optimizer", {"": tree.freeze(through_json({}), "x"), **parts})
    optimizer.state.clear()
    carrier.check(saved, naming)
    carrier.restore(saved, naming)
    found = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    assert all(tensor.dtype is torch.float32 for tensor in found)
    assert [raw(tensor) for tensor in found] == expected


@pytest.mark.parametrize(
    ("target", "word"),
    [
        (3, "job.vars.thing"),
        ("text", "job.vars.thing"),
        ((1, 2), "job.vars.thing"),
        (None, "job.vars.thing"),
        (lambda: 0, "no state"),
        (random.SystemRandom(), "SystemRandom"),
        ({"lock": threading.Lock()}, "`thing.lock`"),
        ([1, {"x": object()}], "`thing.1.x`"),
        (torch.utils.data.DataLoader([1]), "job.loop"),
        (np.array([object()]), "`thing`"),
    ],
)
def test_what_cannot_be_carried(target: object, word: str) -> None:
    """The error names the object, its type and what to do; a plain run says it, too."""
    with pytest.raises(CannotCarryError) as raised:
        carrier_for("thing", target).full({})
    assert word in str(raised.value)


def test_vars_refuse_at_once() -> None:
    """job.vars refuses on assignment what the first checkpoint would have refused hours later."""
    vars_ = _CheckedVars()
    vars_(best=1.0)
    vars_(best=2.0)
    assert vars_.best == 1.0
    with pytest.raises(CannotCarryError, match=r"job\.vars\.handle"):
        vars_.handle = threading.Lock()
    with pytest.raises(AttributeError, match="first value"):
        _ = vars_.nothing


def test_without_launch_nothing_is_there(tmp_path) -> None:
    """A plain run gets its own iterables back: no wrapper, no file, no cost."""
    job = ckptd.attach(model=torch.nn.Linear(1, 1))
    assert type(job) is Job
    items = [1, 2]
    assert job.loop(items) is items
    assert list(job.enumerate("ab", 1)) == [(1, "a"), (2, "b")]
    stream = job.stream([1, 2])
    assert [next(stream) for _ in range(5)] == [1, 2, 1, 2, 1]
    with job.open(tmp_path / "out") as out:
        out.write("line\n")
    assert job.vars(best=1).best == 1
    with pytest.raises(UsageError, match="on_resume"):
        job.loop(items, on_resume="rewind")
