"""Kernels in the place of layers give what the layers give, whichever way is taken, and follow their weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from action_diffusion import choice
from action_diffusion.policy.kernels import layers, winograd
from action_diffusion.policy.model.conv import Conv1d, Double, GroupNorm, Halve, Linear

LAYERS = {
    "conv1d": (lambda: Conv1d(64, 96, 5), lambda n: torch.randn(4, n, 64)),
    "conv1d_narrow": (lambda: Conv1d(3, 40, 3), lambda n: torch.randn(8, n, 3)),
    "halve": (lambda: Halve(160), lambda n: torch.randn(4, n, 160)),
    "double": (lambda: Double(160), lambda n: torch.randn(4, n, 160)),
    "linear": (lambda: Linear(512, 256), lambda n: torch.randn(4, n, 512)),
    "group_norm": (lambda: GroupNorm(4, 64), lambda n: torch.randn(4, n, 64) + 3),
    "conv2d": (lambda: nn.Conv2d(96, 96, 3, padding=1, bias=False), lambda n: torch.randn(n, 96, 7, 5)),
    "conv2d_strided": (lambda: nn.Conv2d(64, 128, 3, stride=2, padding=1), lambda n: torch.randn(n, 64, 8, 8)),
}
"""A layer, and inputs for a batch of n."""


@pytest.fixture(autouse=True)
def tables_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def ways(monkeypatch):
    """`ways(name)`: take this way wherever there is one, and the first elsewhere. Returns what was offered."""
    offered = []

    def take(name):
        def fastest(operation, size, ways, ours=()):
            offered.append((operation, tuple(ways)))
            return name if name in ways else next(iter(ways))

        monkeypatch.setattr(choice, "fastest", fastest)
        return offered

    return take


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of the input and all weights."""
    x = x.clone().requires_grad_()
    out = layer(x)
    direction = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad(out, (x, *layer.parameters()), direction)]


def assert_close(ours, exact) -> None:
    for mine, theirs in zip(ours, exact, strict=True):
        size = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=3e-5 * size)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", ["windows", "shifted", "winograd", "torch", "time_first", "onednn"])
@pytest.mark.parametrize("keep", [True, False])
def test_every_way_of_a_layer_gives_the_same(name, way, keep, ways):
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    layer = make().eval()
    exact = copy.deepcopy(layer).double()
    xs = [inputs(n) for n in (1, 5, 70)]
    expected = [(exact(x.double()).detach(), gradients(exact, x.double())) for x in xs]
    ways(way)
    layers.install(layer, keep=keep)
    for x, (out, grads) in zip(xs, expected, strict=True):
        with torch.no_grad():
            assert_close([layer(x), layer(x)], [out, out])
        assert_close(gradients(layer, x), grads)
        with torch.inference_mode():
            assert_close([layer(x)], [out])


def test_there_are_several_ways_where_there_should_be(ways):
    offered = ways("torch")
    for make, inputs in LAYERS.values():
        layer = make().eval()
        layers.install(layer, keep=True)
        with torch.no_grad():
            layer(inputs(2))
    compiled = ("winograd",) if winograd.library() is not None else ()
    assert ("conv1d", ("windows", "shifted", *compiled)) in offered
    assert ("conv2d", ("torch", "onednn", *compiled)) in offered
    assert ("group_norm", ("torch", "time_first")) in offered
    assert ("product", ("torch", "onednn")) in offered


@pytest.mark.parametrize("name", ["conv1d", "linear", "conv2d"])
@pytest.mark.parametrize("change", ["load", "optimiser", "half"])
def test_what_is_laid_out_follows_the_weights(name, change, ways):
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().eval(), inputs(4)
    ways("winograd" if name != "linear" else "onednn")
    layers.install(layer, keep=True)
    with torch.no_grad():
        before = layer(x)
    if change == "load":
        layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()})
    elif change == "optimiser":  # a fused one's writes are not recorded by torch
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    else:
        layer.bfloat16().float()
    with torch.no_grad():
        after = layer(x)
        plain = type(layer).forward(copy.deepcopy(layer), x) if name == "conv2d" else after
        layers.remove(layer)
        torch.testing.assert_close(after, layer(x), rtol=0, atol=1e-4 * after.abs().max().item())
    assert not torch.equal(before, after)
    assert plain.shape == after.shape


def test_a_policy_in_training_keeps_nothing(ways):
    """An average that is copied into the weights, as in a validation, is what runs: torch does not record that."""
    ways("winograd")
    layer = Conv1d(64, 64, 5)
    layers.install(layer, keep=False)
    x = torch.randn(4, 3, 64)
    with torch.no_grad():
        layer.eval()
        before = layer(x)
        layer.weight.data.copy_(2 * layer.weight.data)
        after = layer(x)
    torch.testing.assert_close(after - layer.bias, 2 * (before - layer.bias), rtol=1e-4, atol=1e-4)


def test_copies_have_kernels_of_their_own():
    layer, x = Conv1d(64, 64, 5).eval(), torch.randn(4, 3, 64)
    layers.install(layer, keep=True)
    with torch.no_grad():
        before = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            forward: Any = other.forward
            assert forward.layer is other
            assert other.product.layer is other
            other.weight.zero_()
            torch.testing.assert_close(other(x), other.bias.expand(4, 3, 64))
        assert torch.equal(layer(x), before)


def test_other_types_layouts_and_traces_are_left_to_the_layers():
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False).eval().requires_grad_(False)
    layers.install(layer, keep=True)
    with torch.no_grad():
        assert layer(torch.randn(64, 20, 20)).shape == (64, 20, 20)  # one image, without a batch
        traced = torch.jit.trace(lambda x: layer(x), torch.randn(2, 64, 6, 6))
        x = torch.randn(2, 64, 6, 6)
        torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=3e-5)
        assert layer.double()(x.double()).dtype == torch.float64
    time = Conv1d(64, 64, 5)
    layers.install(time, keep=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert time(torch.randn(8, 4, 64)).dtype == torch.bfloat16
    for wrong in (torch.randn(8, 200, 128), torch.randn(8, 4, 64).double()):
        with pytest.raises(RuntimeError):
            time(wrong)


def test_without_onednn_there_is_no_such_way(monkeypatch, ways):
    """As on a Mac."""
    offered = ways("onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for make, inputs in LAYERS.values():
        layer = make().eval()
        layers.install(layer, keep=True)
        with torch.no_grad():
            layer(inputs(2))
    assert not any("onednn" in names for _, names in offered)


def test_removed_kernels_leave_plain_layers():
    net = nn.Sequential(Conv1d(64, 64, 5), GroupNorm(4, 64), Halve(64))
    layers.install(net, keep=True)
    assert all("forward" in layer.__dict__ or "product" in layer.__dict__ for layer in net)
    layers.remove(net)
    assert not any({"forward", "product"} & layer.__dict__.keys() for layer in net)
