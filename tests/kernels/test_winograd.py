"""Convolutions by Winograd's transforms, in C: what torch's own give, in outputs and all gradients."""

from __future__ import annotations

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
from action_diffusion.policy.kernels import winograd
from action_diffusion.policy.model.activations import mish

needs_code = pytest.mark.skipif(
    winograd.library() is None, reason="policy/kernels/winograd.c is not compiled: install again where there is gcc"
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
    read, kernel, write = winograd.transforms(outputs, taps)
    d, g = random.standard_normal(outputs + taps - 1), random.standard_normal(taps)
    expected = [d[i : i + taps] @ g for i in range(outputs)]
    np.testing.assert_allclose(write @ ((kernel @ g) * (read @ d)), expected, atol=1e-12)
    assert len(read) == outputs + taps - 1  # as few products as there can be


@pytest.mark.slow
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
        out = winograd.conv1d(x, weight, bias)
        direction = torch.randn(out.shape, generator=random)
        ours = torch.autograd.grad(out, (x, weight, bias), direction)
    exact = F.conv1d(x.double().permute(1, 2, 0), weight.double().permute(2, 1, 0), bias.double(), padding=2)
    exact = exact.permute(2, 0, 1)
    close(out, exact)
    theirs = torch.autograd.grad(exact, (x, weight, bias), direction.double())
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other.double())


@pytest.mark.slow
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
        out = winograd.conv2d(x, weight)
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
    whole = winograd.conv2d(x, weight)
    for one in (0, 17, 49):
        assert torch.equal(winograd.conv2d(x[one : one + 1], weight), whole[one : one + 1])
    with using(1):
        assert torch.equal(winograd.conv2d(x, weight), whole)
    x, weight = torch.randn(8, 50, 64, generator=random), torch.randn(5, 64, 64, generator=random)
    whole = winograd.conv1d(x, weight, weight[0, 0])
    assert torch.equal(winograd.conv1d(x[:, 17:18], weight, weight[0, 0]), whole[:, 17:18])


def test_what_it_is_not_for():
    """Other types, numbers of channels and sizes of kernels."""
    x, weight = torch.randn(8, 64, 6, 6), torch.randn(64, 64, 3, 3)
    assert winograd.fits_2d(x, weight) == (winograd.library() is not None)
    assert not winograd.fits_2d(x.double(), weight.double())
    assert not winograd.fits_2d(x.bfloat16(), weight.bfloat16())
    assert not winograd.fits_2d(x[:, :48], weight[:, :48])
    assert not winograd.fits_2d(x, weight[:, :, :1, :1])
    assert not winograd.fits_2d(x[:, :32], weight)
    assert not winograd.fits_2d(x[0], weight)
    steps, kernel = torch.randn(8, 3, 64), torch.randn(5, 64, 64)
    assert winograd.fits_1d(steps, kernel) == (winograd.library() is not None)
    assert not winograd.fits_1d(steps, kernel[:3])
    assert not winograd.fits_1d(steps[..., :32], kernel)


@needs_code
def test_the_type_that_torch_makes_by_default_is_not_taken():
    x, weight = torch.randn(64, 64, 6, 6, requires_grad=True), torch.randn(64, 64, 3, 3, requires_grad=True)
    plain = winograd.conv2d(x, weight)
    torch.set_default_dtype(torch.float64)
    try:
        ours = winograd.conv2d(x, weight)
        torch.autograd.grad(ours.sum(), (x, weight))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ours, plain)


@pytest.mark.slow
def test_on_other_processors_it_is_the_same(other_processor, monkeypatch):
    library = other_processor(Path(winograd.__file__).parent / "winograd.c")
    monkeypatch.setattr(winograd, "library", lambda: library)
    random = torch.Generator().manual_seed(0)
    image = torch.randn(9, 96, 7, 5, generator=random), torch.randn(64, 96, 3, 3, generator=random) / 30
    steps = torch.randn(6, 41, 96, generator=random), torch.randn(5, 96, 64, generator=random) / 20
    for pair, ours, exact in (
        (image, winograd.conv2d, lambda x, w: F.conv2d(x, w, padding=1)),
        (steps, lambda x, w: winograd.conv1d(x, w, torch.zeros(64)), time_conv),
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


@pytest.mark.slow
def test_the_code_compiles_without_a_warning(tmp_path):
    source = Path(winograd.__file__).parent / "winograd.c"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(tmp_path / "winograd.so")], check=True)


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
