"""Sensors that say more than a policy acts: causal convolutions over all samples of the history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder
from action_diffusion.policy.model.encoders.series import Series

TO, SAMPLES = 2, 50


def encoder(state_dims: dict[str, int] | None = None, **series: Any) -> ObservationEncoder:
    dims = state_dims or {"state": 3, "wrench": SAMPLES * 6}
    return ObservationEncoder(image_keys=[], image_shapes={}, state_dims=dims, n_obs_steps=TO, series=series)


def test_its_features_stand_once_beside_the_states() -> None:
    torch.manual_seed(0)
    made = encoder(wrench={"channels": 6, "feature_dim": 8})
    obs = {"state": torch.randn(4, TO, 3), "wrench": torch.randn(4, TO, SAMPLES * 6)}
    assert made(obs).shape == (4, made.output_dim) == (4, TO * 3 + 8)
    torch.testing.assert_close(made(obs)[:, :6], obs["state"].flatten(1))
    alone = encoder({"wrench": 6}, wrench={"channels": 6, "feature_dim": 8})
    assert alone({"wrench": torch.randn(4, TO, 6)}).shape == (4, 8)


def test_every_sample_counts_in_its_place() -> None:
    torch.manual_seed(0)
    made, values = Series(n=SAMPLES * 6, n_obs_steps=TO, channels=6), torch.randn(1, TO, SAMPLES * 6)
    values.requires_grad_(True)
    made(values).square().sum().backward()
    assert isinstance(values.grad, Tensor)
    assert (values.grad.view(TO * SAMPLES, 6).abs().sum(dim=1) > 0).all()
    shifted = values.detach().view(1, TO * SAMPLES, 6).roll(1, dims=1).view_as(values)
    assert not torch.allclose(made(shifted), made(values.detach()))


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ({"wrenche": {"channels": 6}}, "unknown state in encoder.series 'wrenche': did you mean wrench"),
        ({"wrench": {"channels": 7}}, "300 values a step are no samples of 7 channels"),
    ],
)
def test_what_is_no_series(series: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoder(**series)


@pytest.mark.parametrize("given", ["{wrench: {channels: 0}}", "{wrench: {}}", "{wrench: 6}"])
def test_options_of_no_series(given: str) -> None:
    with pytest.raises(InputError, match="series"):
        load("train", ["task=custom", "data=x", f"policy.encoder.series={given}"])


def test_a_touch_is_told_that_a_single_sample_does_not_tell() -> None:
    """Whether the force has risen or fallen in the last samples; its last value says nothing of it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        slope, last = torch.randn(n, 1, generator=generator), torch.randn(n, 1, generator=generator)
        return (last + slope * torch.linspace(-1, 0, TO * 10)).view(n, TO, 10), slope

    made, head = Series(n=10, n_obs_steps=TO, channels=1, hidden=8, feature_dim=8), torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*made.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(150):
        values, slope = drawn(64)
        loss = (head(made(values)) - slope).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, slope = drawn(500)
    with torch.no_grad():
        assert float((head(made(values)) - slope).square().mean()) < 0.1
