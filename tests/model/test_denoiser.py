"""The U-Net and its time-first layers: equal to torch's own, and everything step-free computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from action_diffusion.errors import InputError
from action_diffusion.policy.model.conv import Conv1d, Double, GroupNorm, Halve
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d


def compare(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Same outputs and same gradients, of the input and of every parameter; x [T, B, C]."""
    a = x.clone().requires_grad_()
    b = x.clone().requires_grad_()
    out, expected = ours(a), theirs(b.permute(1, 2, 0)).permute(2, 0, 1)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=1e-4)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    out.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(a.grad, b.grad, atol=5 * tolerance, rtol=1e-3)
    for name, parameter in ours.named_parameters():
        grad = getattr(theirs, name).grad
        if name == "weight" and grad.ndim == 3:
            grad = grad.permute((2, 0, 1) if isinstance(theirs, nn.ConvTranspose1d) else (2, 1, 0))
        torch.testing.assert_close(parameter.grad, grad, atol=5e-3, rtol=1e-3)


@settings(deadline=None, max_examples=25)
@given(
    steps=st.integers(1, 9),
    batch=st.sampled_from([1, 3, 64]),
    kernel=st.sampled_from([1, 3, 5]),
    channels=st.sampled_from([(2, 8), (8, 8), (16, 4)]),
)
def test_conv_equals_torch(steps, batch, kernel, channels):
    torch.manual_seed(0)
    n_in, n_out = channels
    ours, theirs = Conv1d(n_in, n_out, kernel), nn.Conv1d(n_in, n_out, kernel, padding=kernel // 2)
    theirs.weight.data = ours.weight.data.permute(2, 1, 0).contiguous()
    theirs.bias.data = ours.bias.data
    compare(ours, theirs, torch.randn(steps, batch, channels[0]))


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 9), batch=st.sampled_from([1, 3, 65]), offset=st.sampled_from([0.0, 5.0, -100.0]))
def test_group_norm_equals_torch(steps, batch, offset):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(4, 16), nn.GroupNorm(4, 16)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(mine)
        other.data = mine.data.clone()
    compare(ours, theirs, torch.randn(steps, batch, 16) + offset, tolerance=2e-4 if offset else 2e-5)


@pytest.mark.parametrize("steps", [2, 8])
def test_resizing_equals_torch(steps):
    torch.manual_seed(0)
    halve, strided = Halve(6), nn.Conv1d(6, 6, 3, stride=2, padding=1)
    strided.weight.data, strided.bias.data = halve.weight.data.permute(2, 1, 0).contiguous(), halve.bias.data
    compare(halve, strided, torch.randn(steps, 5, 6))
    double, transposed = Double(6), nn.ConvTranspose1d(6, 6, 4, stride=2, padding=1)
    transposed.weight.data, transposed.bias.data = double.weight.data.permute(1, 2, 0).contiguous(), double.bias.data
    compare(double, transposed, torch.randn(steps, 5, 6))


def unet(**options) -> ConditionalUnet1d:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"action_dim": 3, "condition_dim": 10, "channels": (8, 16, 24)}
    return ConditionalUnet1d(**sizes | options)


def test_what_is_prepared_once_gives_what_is_computed_each_time():
    net = unet()
    condition, times = torch.randn(5, 10), torch.tensor([9.0, 4.0, 0.0])
    x = torch.randn(5, 16, 3)
    film = net.prepare(condition, times)
    for index, time in enumerate(times):
        alone = net.prepare(condition, time.expand(5))
        torch.testing.assert_close(net(x, film.at(index)), net(x, alone.steps + alone.condition))
    rows = torch.tensor([1, 3])
    torch.testing.assert_close(net(x[rows], film.at(1, rows)), net(x, film.at(1))[rows], atol=1e-5, rtol=1e-4)


def test_condition_and_time_reach_every_step_of_the_chunk():
    net = unet()
    x = torch.randn(2, 16, 3)
    film = net.prepare(torch.randn(2, 10), torch.tensor([1.0, 2.0]))
    first, second = net(x, film.at(0)), net(x, film.at(1))
    assert first.shape == x.shape
    assert ((first - second).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"channels": (8, 12), "n_groups": 8}, "12 is not divisible by n_groups=8"),
        ({"activation": "sillu"}, "did you mean silu"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        unet(**options)


def test_a_horizon_that_cannot_be_halved_is_refused():
    unet().check_horizon(16)
    with pytest.raises(InputError, match="horizon=18 must be divisible by 4"):
        unet().check_horizon(18)


def test_autocast_stays_close():
    net = unet()
    x, condition = torch.randn(2 * 64, 16, 3), torch.randn(2 * 64, 10)
    film = net.prepare(condition, torch.tensor([3.0]))
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x, film.at(0))
    torch.testing.assert_close(low.float(), net(x, film.at(0)), atol=0.1, rtol=0.1)
