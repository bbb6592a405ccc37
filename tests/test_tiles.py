"""Convolutions by tiles, in C: what torch's own give, in outputs and all gradients."""

from __future__ import annotations

import copy
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion import native
from action_diffusion.errors import InputError
from action_diffusion.policy import tiles
from action_diffusion.policy.activations import mish
from action_diffusion.policy.conv import Conv1d
from action_diffusion.policy.packing import Conv2d, Linear

needs_code = pytest.mark.skipif(
    tiles.library() is None, reason="policy/tiles.c is not compiled: install again where there is gcc"
)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within 2e-5 of the largest value."""
    assert ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5 * max(1.0, exact.abs().max().item()))


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@given(outputs=st.integers(1, 4), taps=st.sampled_from([3, 5]), seed=st.integers(0, 99))
def test_the_transforms_are_a_convolution(outputs, taps, seed):
    random = np.random.default_rng(seed)
    read, kernel, write = tiles.transforms(outputs, taps)
    d, g = random.standard_normal(outputs + taps - 1), random.standard_normal(taps)
    expected = [d[i : i + taps] @ g for i in range(outputs)]
    np.testing.assert_allclose(write @ ((kernel @ g) * (read @ d)), expected, atol=1e-12)
    assert len(read) == outputs + taps - 1  # as few products as there can be


@needs_code
@settings(deadline=None, max_examples=40)
@given(
    steps=st.integers(1, 17),
    batch=st.sampled_from([1, 3, 70, 140]),
    channels=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96])),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9),
)
def test_along_time_outputs_and_gradients_are_those_of_all_products(steps, batch, channels, threads, seed):
    random, (n_in, n_out) = torch.Generator().manual_seed(seed), channels
    x = torch.randn(steps, batch, n_in, generator=random, requires_grad=True)
    weight = torch.randn(5, n_in, n_out, generator=random).div_((5 * n_in) ** 0.5).requires_grad_()
    bias = torch.randn(n_out, generator=random, requires_grad=True)
    with using(threads):
        out = tiles.conv1d(x, weight, bias)
        direction = torch.randn(out.shape, generator=random)
        ours = torch.autograd.grad(out, (x, weight, bias), direction)
    exact = F.conv1d(x.double().permute(1, 2, 0), weight.double().permute(2, 1, 0), bias.double(), padding=2)
    exact = exact.permute(2, 0, 1)
    close(out, exact)
    theirs = torch.autograd.grad(exact, (x, weight, bias), direction.double())
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other.double())


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
def test_in_images_outputs_and_gradients_are_those_of_all_products(count, size, channels, last, threads, seed):
    """Of every size of image, which tiles seldom fit, and of every remainder of tiles that are taken at once."""
    random, (n_in, n_out) = torch.Generator().manual_seed(seed), channels
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(count, n_in, *size, generator=random).to(memory_format=layout).requires_grad_()
    weight = torch.randn(n_out, n_in, 3, 3, generator=random).div_((9 * n_in) ** 0.5)
    weight = weight.to(memory_format=layout).requires_grad_()
    with using(threads):
        out = tiles.conv2d(x, weight)
        direction = torch.randn(out.shape, generator=random)
        ours = torch.autograd.grad(out, (x, weight), direction)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    close(out, exact)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(ours, torch.autograd.grad(exact, (x, weight), direction.double()), strict=True):
        close(mine, theirs.double())


@needs_code
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads():
    """To the last bit: a policy does the same in a batch of one as in one of fifty."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 64, 7, 7, generator=random), torch.randn(64, 64, 3, 3, generator=random)
    whole = tiles.conv2d(x, weight)
    for one in (0, 17, 49):
        assert torch.equal(tiles.conv2d(x[one : one + 1], weight), whole[one : one + 1])
    with using(1):
        assert torch.equal(tiles.conv2d(x, weight), whole)
    x, weight = torch.randn(8, 50, 64, generator=random), torch.randn(5, 64, 64, generator=random)
    whole = tiles.conv1d(x, weight, weight[0, 0])
    assert torch.equal(tiles.conv1d(x[:, 17:18], weight, weight[0, 0]), whole[:, 17:18])


@needs_code
def test_layers_give_the_same_with_and_without(monkeypatch):
    """In training, and in evaluation with what is kept and without."""
    torch.manual_seed(0)
    layers = Conv2d(192, 192, 3, padding=1, bias=False), Conv1d(256, 256, 5)
    inputs = torch.randn(128, 192, 6, 6), torch.randn(8, 100, 256)
    fast = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    with torch.no_grad():
        fast += [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        layers[0].pack()
        layers[1].pack("fp32")
        for _ in range(2):
            fast += [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        assert all(layer._values is not None for layer in layers)
    monkeypatch.setattr(tiles, "library", lambda: None)
    plain = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    for mine, theirs in zip(fast, 4 * plain, strict=True):
        assert not torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-5)


@needs_code
def test_what_is_kept_is_forgotten_with_the_weights():
    torch.manual_seed(0)
    layers = Conv2d(256, 256, 3, padding=1, bias=False), Conv1d(256, 256, 5)
    inputs = torch.randn(64, 256, 6, 6), torch.randn(8, 64, 256)
    layers[1].bias.data.zero_()
    layers[0].pack()
    layers[1].pack("fp32")
    with torch.no_grad():
        for layer, x in zip(layers, inputs, strict=True):
            before = layer(x)
            assert layer._values is not None
            layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
            assert layer._values is None
            torch.testing.assert_close(layer(x), 2 * before, atol=1e-4, rtol=1e-4)


def test_without_onednn_everything_is_as_usual(monkeypatch):
    """As on a Mac: nothing is laid out, and the products are torch's own."""
    torch.manual_seed(0)
    layers = Conv1d(256, 256, 5), Conv2d(256, 256, 3, padding=1, bias=False), Linear(512, 512)
    inputs = torch.randn(4, 64, 256), torch.randn(2, 256, 3, 3), torch.randn(2, 4, 512)
    with torch.no_grad():
        expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.setattr(torch.ops, "mkldnn", None)
        layers[0].pack("fp32")
        layers[1].pack()
        layers[2].pack("fp32")
        for layer, x, before in zip(layers, inputs, expected, strict=True):
            torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)


def test_a_copy_of_what_is_packed_is_plain_and_computes_the_same():
    torch.manual_seed(0)
    time, image = Conv1d(128, 128, 5), Conv2d(192, 192, 3, padding=1, bias=False)
    steps, frames = torch.randn(4, 64, 128), torch.randn(2, 192, 3, 3)
    time.pack("fp32")
    image.pack()
    with torch.no_grad():
        before = time(steps), image(frames)
        copies = copy.deepcopy(time), copy.deepcopy(image)
        after = copies[0](steps), copies[1](frames)
    assert not copies[0]._packed
    for mine, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


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
    assert not tiles.pays_2d(change(torch.randn(128, 64, 6, 6)), weight, once=False)


@needs_code
def test_what_does_not_fit_is_refused_as_by_torch():
    image, time = Conv2d(64, 64, 3, padding=1, bias=False), Conv1d(64, 64, 5)
    for wrong in (torch.randn(20, 128, 6, 6), torch.randn(20, 64, 6, 6).double()):
        with pytest.raises(RuntimeError):
            image(wrong)
    assert image(torch.randn(64, 60, 60)).shape == (64, 60, 60)  # one image, without a batch
    with pytest.raises(RuntimeError):
        time(torch.randn(8, 200, 128))


@needs_code
def test_the_type_that_torch_makes_by_default_is_not_taken():
    x, weight = torch.randn(64, 64, 6, 6, requires_grad=True), torch.randn(64, 64, 3, 3, requires_grad=True)
    plain = tiles.conv2d(x, weight)
    torch.set_default_dtype(torch.float64)
    try:
        ours = tiles.conv2d(x, weight)
        torch.autograd.grad(ours.sum(), (x, weight))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ours, plain)


@needs_code
def test_a_trace_holds_the_convolution():
    conv, x = Conv2d(64, 64, 3, padding=1, bias=False).eval(), torch.randn(64, 64, 6, 6)
    with torch.no_grad():
        traced = torch.jit.trace(conv, x)
        torch.testing.assert_close(traced(2 * x), conv(2 * x), rtol=0, atol=3e-5)


def test_on_other_processors_it_is_the_same(other_processor, monkeypatch):
    library = other_processor(Path(tiles.__file__).parent / "tiles.c")
    monkeypatch.setattr(tiles, "library", lambda: library)
    random = torch.Generator().manual_seed(0)
    image = torch.randn(9, 96, 7, 5, generator=random), torch.randn(64, 96, 3, 3, generator=random) / 30
    steps = torch.randn(6, 41, 96, generator=random), torch.randn(5, 96, 64, generator=random) / 20
    for pair, ours, exact in (
        (image, tiles.conv2d, lambda x, w: F.conv2d(x, w, padding=1)),
        (steps, lambda x, w: tiles.conv1d(x, w, torch.zeros(64)), time_conv),
    ):
        x, weight = (value.clone().requires_grad_() for value in pair)
        out = ours(x, weight)
        direction = torch.randn(out.shape, generator=random)
        doubles = [value.double().requires_grad_() for value in pair]
        expected = exact(*doubles)
        close(out, expected)
        theirs = torch.autograd.grad(expected, doubles, direction.double())
        for mine, other in zip(torch.autograd.grad(out, (x, weight), direction), theirs, strict=True):
            close(mine, other)


def time_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv1d(x.permute(1, 2, 0), weight.permute(2, 1, 0), padding=2).permute(2, 0, 1)


def test_code_of_another_version_is_not_run(tmp_path):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    source = tmp_path / "old.c"
    for body, name in (("int abi(void) { return 7; }", "_old"), ("int other(void) { return 7; }", "_older")):
        source.write_text(body)
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / f"{name}{suffix}")], check=True)
        with pytest.warns(UserWarning, match=f"{name}.* is of another version"):
            assert native.load(tmp_path, name, 1) is None
    (tmp_path / f"_text{suffix}").write_text("no code")
    with pytest.warns(UserWarning, match="pip install again"):
        assert native.load(tmp_path, "_text", 1) is None
    assert native.load(tmp_path, "_old", 7).code.abi() == 7
    assert native.load(tmp_path, "_none", 1) is None


def test_an_instruction_set_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(native.SET_VARIABLE, "avx3")
    with pytest.raises(InputError, match=r"unknown instruction set 'avx3' in ACTION_DIFFUSION_ISA: did you mean avx2"):
        native.load(tmp_path, "_none", 1)
    monkeypatch.setenv(native.SET_VARIABLE, "")
    assert native.load(tmp_path, "_none", 1) is None


def test_without_the_compiled_code_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(tiles, "library", lambda: None)
    monkeypatch.setattr(tiles, "_call", None)
    assert Conv2d(192, 192, 3, padding=1, bias=False)(torch.randn(128, 192, 6, 6)).requires_grad
    assert Conv1d(256, 256, 5)(torch.randn(8, 100, 256)).requires_grad


def test_the_code_compiles_without_a_warning(tmp_path):
    source = Path(tiles.__file__).parent / "tiles.c"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(tmp_path / "tiles.so")], check=True)


def test_mish_is_torchs():
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -1e4, 1e4])]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    close(mish(x), F.mish(exact).detach())
    close(mish(x.detach()), F.mish(exact).detach())
    direction = torch.linspace(-1, 2, len(x))
    (ours,) = torch.autograd.grad(mish(x), x, direction)
    (theirs,) = torch.autograd.grad(F.mish(exact), exact, direction.double())
    close(ours, theirs)
    assert mish(torch.tensor([float("nan")])).isnan().all()
