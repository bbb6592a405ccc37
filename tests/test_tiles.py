"""Convolutions of images by tiles, in C: what torch's own give, in outputs and all gradients."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.policy import tiles
from action_diffusion.policy.packing import Conv2d

needs_code = pytest.mark.skipif(
    tiles.library() is None, reason="policy/tiles.c is not compiled: install again where there is gcc"
)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within 2e-5 of the largest value."""
    assert ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5 * max(1.0, exact.abs().max().item()))


@needs_code
@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 20),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    channels=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96])),
    last=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9),
)
def test_outputs_and_gradients_are_those_of_all_products(count, size, channels, last, threads, seed):
    """Of every size of image, which tiles seldom fit, and of every remainder of tiles that are taken at once."""
    random, (n_in, n_out) = torch.Generator().manual_seed(seed), channels
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(count, n_in, *size, generator=random).to(memory_format=layout).requires_grad_()
    weight = torch.randn(n_out, n_in, 3, 3, generator=random).div_((9 * n_in) ** 0.5)
    weight = weight.to(memory_format=layout).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = tiles.conv2d(x, weight)
        direction = torch.randn(out.shape, generator=random)
        ours = torch.autograd.grad(out, (x, weight), direction)
    finally:
        torch.set_num_threads(before)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    close(out, exact)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(ours, torch.autograd.grad(exact, (x, weight), direction.double()), strict=True):
        close(mine, theirs.double())


@needs_code
def test_an_image_does_not_depend_on_its_neighbours_nor_on_threads():
    """To the last bit: a policy does the same in a batch of one as in one of fifty."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 64, 7, 7, generator=random), torch.randn(64, 64, 3, 3, generator=random)
    whole = tiles.conv2d(x, weight)
    for one in (0, 17, 49):
        assert torch.equal(tiles.conv2d(x[one : one + 1], weight), whole[one : one + 1])
    torch.set_num_threads(1)
    try:
        assert torch.equal(tiles.conv2d(x, weight), whole)
    finally:
        torch.set_num_threads(2)


@needs_code
def test_a_layer_gives_the_same_with_and_without(monkeypatch):
    """In training, and with what is kept and without in evaluation."""
    torch.manual_seed(0)
    conv = Conv2d(192, 192, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    frames = torch.randn(128, 192, 6, 6).to(memory_format=torch.channels_last)
    fast = [conv(frames)]
    with torch.no_grad():
        fast.append(conv(frames))
        conv.pack()
        fast += [conv(frames), conv(frames)]
        assert conv._values is not None
    monkeypatch.setattr(tiles, "pays", lambda *_, **__: False)
    for out in fast:
        torch.testing.assert_close(out, conv(frames), rtol=0, atol=3e-5)


@needs_code
def test_values_that_are_kept_are_forgotten_with_the_weights():
    torch.manual_seed(0)
    conv, frames = Conv2d(256, 256, 3, padding=1, bias=False), torch.randn(64, 256, 6, 6)
    conv.pack()
    with torch.no_grad():
        before = conv(frames)
        assert conv._values is not None
        conv.load_state_dict({name: 2 * value for name, value in conv.state_dict().items()})
        assert conv._values is None
        torch.testing.assert_close(conv(frames), 2 * before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "channels"),
    [({"stride": 2}, 192), ({"padding": 0}, 192), ({"bias": True}, 192), ({"dilation": 2}, 192), ({}, 48)],
)
def test_other_convolutions_are_left_to_torch(options, channels, monkeypatch):
    monkeypatch.setattr(tiles, "conv2d", None)
    conv = Conv2d(channels, channels, 3, **{"padding": 1, "bias": False, **options})
    assert conv(torch.randn(128, channels, 6, 6)).requires_grad


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.bfloat16])
def test_other_types_are_left_to_torch(change, monkeypatch):
    monkeypatch.setattr(tiles, "conv2d", None)
    weight = change(torch.randn(64, 64, 3, 3))
    assert not tiles.pays(change(torch.randn(128, 64, 6, 6)), weight, once=False)


def test_without_the_compiled_code_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(tiles, "library", lambda: None)
    monkeypatch.setattr(tiles, "conv2d", None)
    conv = Conv2d(192, 192, 3, padding=1, bias=False)
    assert conv(torch.randn(128, 192, 6, 6)).requires_grad


def test_the_code_compiles_without_a_warning(tmp_path):
    source = Path(tiles.__file__).parent / "tiles.c"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(tmp_path / "tiles.so")], check=True)
