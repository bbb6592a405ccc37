"""What is not observed, told from the history."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.model.encoders.context import Context
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder

STEPS = 16


def encoder(**context: int) -> ObservationEncoder:
    return ObservationEncoder(
        image_keys=[], image_shapes={}, state_dims={"state": 3}, n_obs_steps=STEPS, context=context
    )


def test_recent_steps_as_they_are_and_a_context_of_all() -> None:
    torch.manual_seed(0)
    made, state = encoder(size=4, recent=2), torch.randn(5, STEPS, 3)
    embedding = made({"state": state})
    assert embedding.shape == (5, made.output_dim) == (5, 10)
    assert torch.equal(embedding[:, :6], state[:, -2:].flatten(1))
    for step in (0, STEPS - 1):
        changed = state.clone()
        changed[:, step] += 1
        assert not torch.equal(made({"state": changed})[:, 6:], embedding[:, 6:])


def winds(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points that go as they are told, and with a wind [n] that stays; places are seen ± 0.3: history, wind."""
    wind, told = torch.randn(n, generator=generator), torch.randn(n, STEPS, generator=generator)
    at = (told + wind[:, None]).cumsum(dim=1) + 0.3 * torch.randn(n, STEPS, generator=generator)
    at = at - at[:, -1:]
    return torch.stack([at / 4, told, torch.zeros_like(told)], dim=2), wind


@pytest.mark.slow
def test_a_hidden_wind_is_learnt() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    context, head = Context(step_dim=3, n_obs_steps=STEPS, size=8, hidden=32), torch.nn.LazyLinear(1)
    head(context(torch.zeros(2, STEPS, 3)))
    optimizer = torch.optim.Adam([*context.parameters(), *head.parameters()], lr=5e-3)
    for _ in range(250):
        history, wind = winds(128, generator)
        loss = (head(context(history))[:, 0] - wind).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    history, wind = winds(2000, generator)
    with torch.no_grad():
        left = (head(context(history))[:, 0] - wind).square().mean()
    assert left < 0.1  # of a variance of 1


def test_a_policy_with_a_context_is_saved_and_loaded(tmp_path) -> None:
    policy = tiny_policy(demonstrations(), encoder={"name": "observation", "context": {"recent": 1, "size": 4}})
    obs = {"state": demonstrations()["state"][:2]}
    config = TINY | {"encoder": {"name": "observation", "context": {"recent": 1, "size": 4}}}
    bundles.save(tmp_path / "bundle", policy, {"policy": config}, golden_obs=obs)
    loaded = bundles.load(tmp_path / "bundle", verify=True)
    assert isinstance(loaded.encoder, ObservationEncoder)
    assert loaded.encoder.output_dim == policy.encoder.output_dim == 6 + 4


def test_it_is_chosen_on_the_command_line() -> None:
    words = ["policy.encoder.context={size:8,recent:2}", "task.n_obs_steps=16", "task.horizon=24"]
    assert load("train", words)["policy"]["encoder"]["context"] == {"size": 8, "recent": 2}
    with pytest.raises(InputError, match=r"policy\.encoder\.context\.size"):
        load("train", ["policy.encoder.context={size:0}"])
    with pytest.raises(InputError, match="did you mean hidden"):
        load("train", ["policy.encoder.context={hiden:8}"])


def test_more_recent_steps_than_there_are() -> None:
    spec = tiny_policy(demonstrations()).spec
    with pytest.raises(InputError, match="recent=3: expected 1 to 2"):
        build_policy(TINY | {"encoder": {"name": "observation", "context": {"recent": 3}}}, spec)
