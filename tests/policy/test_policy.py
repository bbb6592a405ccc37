"""The policy: shapes, units, and that sampling and training are functions of what is handed in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from action_diffusion.errors import InputError
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

STATE = np.arange(10, dtype=np.float32).reshape(2, 5) + 100


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_predict_returns_actions_with_and_without_a_batch_axis(policy):
    alone = policy.predict({"state": STATE}, noise_generator=generators(1))
    batch = policy.predict({"state": np.stack([STATE, STATE])}, noise_generator=generators(1, 2))
    assert alone["action"].shape == (4, 2)
    assert alone["action_pred"].shape == (8, 2)
    assert batch["action"].shape == (2, 4, 2)
    np.testing.assert_allclose(batch["action_pred"][0], alone["action_pred"], atol=1e-3)
    np.testing.assert_array_equal(alone["action"], alone["action_pred"][1:5])
    assert alone["action"].dtype == np.float32


def test_predictions_are_in_the_data_s_units(policy, buffer):
    chunk = policy.predict({"state": STATE}, noise_generator=generators(1))["action_pred"]
    actions = buffer["action"][:]
    slack = 1e-3 * np.ptp(actions, axis=0)
    assert (chunk >= actions.min(0) - slack).all()
    assert (chunk <= actions.max(0) + slack).all()


def test_n_samples_encodes_once_and_repeats(policy):
    calls = []
    handle = policy.encoder.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    obs = {"state": torch.from_numpy(np.stack([STATE, STATE + 1]))}
    sample = policy.sample(obs, n_samples=3, noise_generator=generators(*range(6)))
    handle.remove()
    assert calls == [2]
    assert sample.action.shape == (2, 3, 8, 2)
    single = policy.sample({"state": obs["state"][1:]}, noise_generator=generators(4))
    torch.testing.assert_close(sample.action[1, 1], single.action[0], atol=1e-3, rtol=1e-4)


def test_explicit_noise_makes_sampling_deterministic(policy):
    obs = {"state": torch.from_numpy(STATE[None])}
    noise = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.sample(obs, noise=noise).action, policy.sample(obs, noise=noise).action)
    with pytest.raises(InputError, match=r"noise has shape \[1, 7, 2\], expected \[1, 8, 2\]"):
        policy.sample(obs, noise=noise[:, :7])


def test_gradients_reach_weights_and_noise_only_when_asked(policy):
    obs = {"state": torch.from_numpy(STATE[None])}
    noise = torch.randn(1, 8, 2, requires_grad=True)
    assert not policy.sample(obs, noise=noise.detach()).action.requires_grad
    policy.sample(obs, noise=noise, grad=True).normalized.square().sum().backward()
    assert noise.grad is not None
    assert noise.grad.abs().max() > 0
    assert all(p.grad is not None for p in policy.denoiser.parameters())


def test_the_chain_is_returned_when_asked(policy):
    obs = {"state": torch.from_numpy(STATE[None])}
    sample = policy.sample(obs, return_chain=True)
    assert len(sample.chain) == 5
    torch.testing.assert_close(sample.chain[-1].x_next, sample.normalized)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"process": {"name": "diffusion", "prediction": "sample"}},
        {"process": {"name": "diffusion", "prediction": "v_prediction"}},
        {"process": {"name": "flow"}, "sampler": {"scheduler": "flow", "num_inference_steps": 5}},
        {"objective": {"loss": "l1", "noise_draws": 3}},
        {"objective": {"loss": "huber", "loss_on_padding": False, "noise_draws": 2}},
    ],
)
def test_training_lowers_the_loss(make_policy, buffer, changes):
    policy = make_policy(**changes).train()
    state = torch.from_numpy(buffer["state"][:64]).view(32, 2, 5)
    action = torch.from_numpy(buffer["action"][:64]).view(8, 8, 2).repeat(4, 1, 1)
    mask = torch.ones(32, 8, dtype=torch.bool)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = policy({"state": state}, action, mask, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_the_loss_is_a_function_of_the_generator(policy, buffer):
    state, action = torch.from_numpy(buffer["state"][:8]).view(4, 2, 5), torch.randn(4, 8, 2)
    first, again, other = (
        policy({"state": state}, action, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("process", "named"),
    [
        ({"name": "diffusion", "prediction": "sample"}, "l1"),
        ({"name": "flow", "prediction": "sample"}, "l1"),
        ({"name": "diffusion", "prediction": "epsilon"}, "mse"),
        ({"name": "diffusion", "prediction": "v_prediction"}, "mse"),
        ({"name": "flow", "prediction": "velocity"}, "mse"),
    ],
)
def test_without_a_name_the_loss_is_the_one_for_what_is_predicted(make_policy, buffer, process, named):
    sampler = {"scheduler": "flow" if process["name"] == "flow" else "ddim", "num_inference_steps": 5}
    state, action = torch.from_numpy(buffer["state"][:8]).view(4, 2, 5), torch.from_numpy(buffer["action"][:32])
    losses = [
        make_policy(process=process, sampler=sampler, objective={"loss": loss})(
            {"state": state}, action.view(4, 8, 2), generator=torch.Generator().manual_seed(0)
        )
        for loss in (None, named)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("on_padding", "counted"), [(False, 6), (True, 8)])
def test_padding_can_be_left_out_of_the_loss(make_policy, buffer, on_padding, counted):
    """Of a denoiser that always answers 0, the loss of predicting the sample is the mean square of what counts."""
    policy = make_policy(
        process={"name": "diffusion", "prediction": "sample"},
        objective={"loss": "mse", "loss_on_padding": on_padding, "noise_draws": 2},
    )
    policy.denoiser.forward = lambda x, film: torch.zeros_like(x)
    obs = {"state": torch.from_numpy(buffer["state"][:4]).view(2, 2, 5)}
    action = torch.from_numpy(buffer["action"][:16]).view(2, 8, 2)
    mask = torch.arange(8).expand(2, 8) < 6
    expected = policy.normalize_action(action, obs)[:, :counted].square().mean()
    torch.testing.assert_close(policy(obs, action, mask), expected)


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({}, "'state' is missing"),
        ({"states": STATE}, "did you mean state"),
        ({"state": STATE[:, :4]}, r"has shape \[2, 4\], the policy takes \[2, 5\]"),
        ({"state": STATE[:1]}, r"has shape \[1, 5\]"),
        ({"state": np.full_like(STATE, np.nan)}, "NaN"),
    ],
)
def test_observations_that_differ_are_refused(policy, obs, message):
    with pytest.raises(InputError, match=message):
        policy.predict(obs)


def test_images_must_be_uint8():
    spec = PolicySpec(
        observations={"image": ObservationSpec(shape=(4, 4, 3), dtype="uint8", kind="image")},
        action=ActionSpec(shape=(2,)),
        n_obs_steps=1,
        horizon=4,
        n_action_steps=2,
        control_rate=10.0,
    )
    assert spec.check({"image": np.zeros((1, 4, 4, 3), np.uint8)}) is False
    with pytest.raises(InputError, match="images are uint8"):
        spec.check({"image": np.zeros((1, 4, 4, 3), np.float32)})


def test_steps_that_do_not_fit_the_horizon_are_refused():
    with pytest.raises(InputError, match="n_action_steps=8 does not fit"):
        PolicySpec(
            observations={}, action=ActionSpec(shape=(2,)), n_obs_steps=2, horizon=8, n_action_steps=8, control_rate=1.0
        )
