"""The quick way to a generator's state gives what the public way gives, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ckptd.worker import peek, rng


@pytest.fixture(autouse=True)
def restored():
    """Leaves the process's own generators as they were."""
    states = rng.capture_global()
    yield
    rng.restore_global(states)


def numpy_reader() -> peek.NumpyReader:
    return peek.NumpyReader(lambda: b"another kind")


def test_the_quick_way_works_here() -> None:
    """On this Python and numpy the quick way is taken."""
    assert peek._python_offset() is not None
    assert peek._numpy_offset() is not None


def test_equal_over_mixed_draws() -> None:
    """After every one of thousands of draws of all kinds, seeds and restored states."""
    choose = random.Random(3)
    python, numpy = peek.python_reader(), numpy_reader()
    saved = random.getstate(), np.random.get_state()
    draws = [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.getrandbits(77),
        lambda: random.shuffle(list(range(40))),
        lambda: random.seed(choose.randrange(100)),
        lambda: random.setstate(saved[0]),
        np.random.rand,
        np.random.randn,
        lambda: np.random.randn(311),
        lambda: np.random.permutation(50),
        lambda: np.random.seed(choose.randrange(100)),
        lambda: np.random.set_state(saved[1]),
    ]
    cached = {"python": set(), "numpy": set()}
    for _ in range(4000):
        choose.choice(draws)()
        assert python() == peek.pack_python(random.getstate())
        assert numpy() == peek.pack_numpy(np.random.get_state())
        cached["python"].add(random.getstate()[2] is None)
        cached["numpy"].add(np.random.get_state()[3])
    assert cached == {"python": {True, False}, "numpy": {0, 1}}


def draw() -> list:
    return [random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist(), random.random()]


def test_packed_and_restored() -> None:
    """What a worker packs brings every generator back, also the cached second normal value."""
    packer = rng.Packer()
    random.gauss(0, 1)
    np.random.randn()
    packed = packer.changed()
    assert None not in packed
    expected = [random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist(), random.random()]
    rng.restore_packed(packed)
    assert [
        random.gauss(0, 1),
        np.random.randn(),
        torch.rand(3).tolist(),
        random.random(),
    ] == expected


def test_only_what_changed() -> None:
    """A stream that nobody drew from is not sent again; one normal value from the cache counts."""
    packer = rng.Packer()
    np.random.randn()
    packer.changed()
    assert packer.changed() == (None, None, None)
    np.random.randn()
    python, numpy, torch_ = packer.changed()
    assert (python, torch_) == (None, None)
    assert numpy is not None


def test_without_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the states lie elsewhere, the public way gives the same."""
    monkeypatch.setattr(peek, "_numpy_offset", lambda: None)
    monkeypatch.setattr(peek, "_python_offset", lambda: None)
    assert numpy_reader()() == peek.pack_numpy(np.random.get_state())
    assert peek.python_reader()() == peek.pack_python(random.getstate())


@pytest.fixture
def bit_generator():
    """Puts the global stream's own bit generator back."""
    before = np.random.mtrand._rand._bit_generator
    yield
    np.random.set_bit_generator(before)


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64, np.random.Philox])
def test_another_bit_generator(bit_generator: None, kind: type) -> None:
    """A bit generator that is put in the place of the global stream's is seen at once."""
    packer = rng.Packer()
    packer.changed()
    np.random.set_bit_generator(kind(5))
    np.random.randn()
    python, numpy, torch_ = packer.changed()
    assert (python, torch_) == (None, None)
    packed = rng.Packer().changed()
    assert packed[1] == numpy
    expected = draw()
    rng.restore_packed(packed)
    assert draw() == expected


def test_patches_give_the_whole_state() -> None:
    """What is sent with a batch, put together, is the worker's state, however much was drawn; and
    it is small unless a block of random words was made anew."""
    packer, patches, dice = rng.Packer(), rng.Patches(), random.Random(3)
    whole: list[bytes | None] = [None, None, None]
    small = 0
    for _ in range(300):
        for _ in range(dice.choice([0, 1, 3, 32, 700])):
            random.random()
        for _ in range(dice.choice([0, 2, 40])):
            np.random.standard_normal()
        torch.rand(dice.choice([1, 5, 2000]))
        sent = patches.of(packer.changed())
        for i, patch in enumerate(sent):
            if patch is not None:
                whole[i] = rng.patched(whole[i], patch)
                small += not isinstance(patch, bytes)
        fresh = rng.Packer().changed()
        assert tuple(whole) == fresh
    assert small > 200
