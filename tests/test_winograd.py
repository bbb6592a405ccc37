"""Convolutions by fewer products: what torch's own give, in outputs and all gradients, and no guess where it pays."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.policy import winograd
from action_diffusion.policy.activations import mish
from action_diffusion.policy.conv import Conv1d
from action_diffusion.policy.packing import Conv2d, Linear


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within 2e-5 of the largest value."""
    assert ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5 * max(1.0, exact.abs().max().item()))


@given(outputs=st.integers(1, 4), taps=st.sampled_from([3, 5]), seed=st.integers(0, 99))
def test_the_transforms_are_a_convolution(outputs, taps, seed):
    random = np.random.default_rng(seed)
    read, kernel, write = winograd.transforms(outputs, taps)
    d, g = random.standard_normal(outputs + taps - 1), random.standard_normal(taps)
    expected = [d[i : i + taps] @ g for i in range(outputs)]
    np.testing.assert_allclose(write @ ((kernel @ g) * (read @ d)), expected, atol=1e-12)
    assert len(read) == outputs + taps - 1  # as few products as there can be


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 9), batch=st.sampled_from([1, 3, 70]), taps=st.sampled_from([3, 5]), seed=st.integers(0, 9))
def test_along_time_outputs_and_gradients_are_those_of_all_products(steps, batch, taps, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, batch, 6, generator=random, requires_grad=True)
    weight = torch.randn(taps, 6, 4, generator=random, requires_grad=True)
    bias = torch.randn(4, generator=random, requires_grad=True)
    exact = F.conv1d(x.double().permute(1, 2, 0), weight.double().permute(2, 1, 0), bias.double(), padding=taps // 2)
    exact = exact.permute(2, 0, 1)
    out = winograd.conv1d(x, weight, bias)
    close(out, exact)
    close(winograd.conv1d_packed(x.detach(), winograd.pack_1d(weight, steps), taps, bias.detach()), exact)
    direction = torch.randn(out.shape, generator=random)
    for ours, theirs in zip(
        torch.autograd.grad(out, (x, weight, bias), direction),
        torch.autograd.grad(exact, (x, weight, bias), direction.double()),
        strict=True,
    ):
        close(ours, theirs.double())


def test_a_layer_gives_the_same_with_and_without(monkeypatch):
    """At sizes where the fast way is taken, in training and, with what is packed, in evaluation."""
    torch.manual_seed(0)
    layer, x = Conv1d(256, 256, 5), torch.randn(8, 100, 256)
    assert winograd.pays_1d(x, layer.weight, kept=False)
    assert winograd.pays_1d(x[:, :32], layer.weight, kept=True)
    called = []
    for name in ("conv1d", "conv1d_packed"):
        function = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *a, n=name, f=function: called.append(n) or f(*a))
    layer.pack("fp32")
    with torch.no_grad():
        fast = [layer(x[:, :32]), layer(x[:, :32])]
    fast.append(layer(x))
    assert called == ["conv1d_packed", "conv1d_packed", "conv1d"]
    monkeypatch.setattr(winograd, "pays_1d", lambda *_, **__: False)
    plain = [layer(x[:, :32]), layer(x[:, :32]), layer(x)]
    for mine, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-5)


def test_what_is_kept_is_forgotten_with_the_weights():
    torch.manual_seed(0)
    layer, x = Conv1d(128, 128, 5), torch.randn(4, 64, 128)
    layer.pack("fp32")
    with torch.no_grad():
        before = layer(x)
        assert layer._values
        layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
        assert not layer._values
        torch.testing.assert_close(layer(x), 2 * before, atol=1e-4, rtol=1e-4)
        layer.pack("fp32")
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
