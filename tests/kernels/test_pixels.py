"""Pixels are the same, to the last bit, whether C code cuts and converts them or numpy and torch do."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.datasets.batches import pixels

needs_code = pytest.mark.skipif(
    pixels.library() is None, reason="datasets/batches/pixels.c is not compiled: install again where there is gcc"
)


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """The code in C, wherever it can be used."""
    monkeypatch.setenv("ACTION_DIFFUSION_KERNELS", "on")


def plain() -> mock._patch:
    return mock.patch.object(pixels, "library", return_value=None)


@needs_code
@settings(deadline=None, max_examples=50)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    less=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    windows=st.integers(0, 70),
    steps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_crops_are_numpys(size, less, windows, steps, seed):
    random = np.random.default_rng(seed)
    small = tuple(max(1, a - b) for a, b in zip(size, less, strict=True))
    frames = random.integers(0, 256, (5, *size, 3), dtype=np.uint8)
    rows = random.integers(0, 5, (windows, steps))
    corners = random.integers(0, np.array(size) - small + 1, (windows, 2))
    out = pixels.crop(frames, rows, corners, small).numpy()
    expected = [
        [frames[row, top : top + small[0], left : left + small[1]] for row in line]
        for line, (top, left) in zip(rows, corners, strict=True)
    ]
    np.testing.assert_array_equal(out, np.array(expected, np.uint8).reshape(out.shape))
    with plain():
        np.testing.assert_array_equal(out, pixels.crop(frames, rows, corners, small))


@needs_code
@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=3), threads=st.sampled_from([1, 2, 3]))
def test_floats_are_torchs(shape, threads):
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    expected = values.float() * (1 / 255)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(pixels.to_float(values), expected)
    finally:
        torch.set_num_threads(before)
    with plain():
        assert torch.equal(pixels.to_float(values), expected)


@needs_code
def test_every_byte_is_a_255th():
    expected = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    np.testing.assert_array_equal(pixels.to_float(torch.arange(256, dtype=torch.uint8)).numpy(), expected)


def test_on_other_processors_it_is_the_same(other_processor, monkeypatch):
    library = other_processor(Path(pixels.__file__).parent / "pixels.c")
    frames = np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3), dtype=np.uint8)
    given = frames, np.array([[0, 1], [4, 3]]), np.array([[1, 2], [3, 0]]), (6, 7)
    with plain():
        expected, floats = pixels.crop(*given), pixels.to_float(torch.from_numpy(frames))
    monkeypatch.setattr(pixels, "library", lambda: library)
    assert torch.equal(pixels.crop(*given), expected)
    assert torch.equal(pixels.to_float(torch.from_numpy(frames)), floats)


@needs_code
def test_what_lies_apart_in_memory_is_read_right_or_refused():
    frames = torch.randint(0, 256, (4, 10, 12, 3), dtype=torch.uint8)
    part = frames[1:3, 2:8, ::2]
    assert torch.equal(pixels.to_float(part), part.float() * (1 / 255))
    for wrong in (frames.numpy()[:, :, ::-1], frames.float().numpy()):
        with pytest.raises(ValueError, match="uint8 in one piece"):
            pixels.crop(wrong, np.array([[0, 1]]), np.array([[1, 2]]), (3, 4))
