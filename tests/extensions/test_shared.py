"""Shared control: the person's values come out as they are, and the policy's go with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import demonstrations, tiny_policy

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Diffusion
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.extensions.shared import SharedControl, extrapolated

FIRST = np.array([True, False])
FRAMES = {
    "minmax": {},
    "gaussian": {"normalizer": {"default": "gaussian"}},
    "planar_object": {"action_frame": {"name": "planar_object", "observation": "state", "pose": [2, 3, 4]}},
}


def observations(rows=3):
    return {"state": np.random.default_rng(0).normal(100, 5, (rows, 2, 5)).astype(np.float32)}


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("sections", FRAMES.values(), ids=FRAMES)
def test_owned_values_come_out_in_the_units_of_the_data(sections, rounds):
    """What is past is nobody's; what the person says for fewer steps goes on as its last."""
    policy = tiny_policy(demonstrations(), **sections)
    plain = policy.predict(observations(), noise_generator=torch.Generator().manual_seed(0))["action_pred"]
    shared = SharedControl(policy, rounds=rounds)
    shared.own(FIRST, np.array([[101.0, np.nan], [102.0, np.nan]]))
    found = policy.predict(observations(), noise_generator=torch.Generator().manual_seed(0))["action_pred"]
    expected = np.broadcast_to([101, 102, 102, 102, 102, 102, 102], (3, 7))
    np.testing.assert_allclose(found[:, 1:, 0], expected, atol=1e-3)
    assert np.abs(found[:, 0, 0] - 101).min() > 0.01
    shared.own(np.zeros(2, bool))
    again = policy.predict(observations(), noise_generator=torch.Generator().manual_seed(0))["action_pred"]
    np.testing.assert_array_equal(again, plain)


def test_each_chunk_may_have_a_person_of_its_own():
    policy = tiny_policy(demonstrations())
    shared = SharedControl(policy, rounds=0)
    shared.own(np.array([[True, False], [False, True], [False, False]]), np.full((3, 1, 2), 103.0))
    found = policy.predict(observations())["action_pred"][:, 1:]
    np.testing.assert_allclose(found[0, :, 0], 103, atol=1e-3)
    np.testing.assert_allclose(found[1, :, 1], 103, atol=1e-3)
    assert np.abs(np.stack([found[0, :, 1], found[1, :, 0], found[2, :, 0]]) - 103).min() > 1e-3


def test_what_fades_counts_less_and_less():
    policy = tiny_policy(demonstrations())
    shared = SharedControl(policy, fading=4)
    seen = policy.see({key: torch.from_numpy(value) for key, value in observations().items()})
    chunk = policy.normalize_action(torch.full((3, 8, 2), 100.0), seen.obs)
    shared.own(FIRST, np.array([[104.0, 0.0]]))
    found = policy.unnormalize_action(shared.put(seen, chunk), seen.obs)[0]
    torch.testing.assert_close(found[:, 0], torch.tensor([100.0, 104, 103, 102, 101, 100, 100, 100]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[:, 1], torch.full((8,), 100.0), atol=1e-3, rtol=0)


def mixture(process, ways, spread):
    """The exact network for chunks that are one of `ways` [K, H, A], each as often, with `spread` (sd) around it."""

    def denoise(x, step, rows=None):
        variance = (step.a * spread) ** 2 + step.b**2
        distance = (x.unsqueeze(1) - step.a * ways).square().sum((2, 3))
        weight = torch.softmax(-distance / (2 * variance), dim=1)
        each = ways + (step.a * spread**2 / variance) * (x.unsqueeze(1) - step.a * ways)
        return (weight[:, :, None, None] * each).sum(1)

    return denoise


def sampled(rounds, owned, rows=400):
    """Chunks of two ways, (1, 1) and (−1, −1) in every step, for a person who goes the first one with value 0."""
    process = Diffusion(prediction="sample")
    sampler = Sampler(process=process, scheduler="ddim", num_inference_steps=20)
    ways = 0.7 * torch.stack([torch.ones(4, 2), -torch.ones(4, 2)])
    same: Any = SimpleNamespace(
        spec=SimpleNamespace(action=SimpleNamespace(shape=(2,), rotations=()), horizon=4, n_obs_steps=1),
        device=torch.device("cpu"),
        extensions=[],
        normalize_action=lambda action, obs: action,
        unnormalize_action=lambda action, obs: action,
    )
    shared = SharedControl(same, rounds=rounds)
    shared.own(owned, np.array([[0.7, 0.7]]))
    noise = torch.randn(rows, 4, 2, generator=torch.Generator().manual_seed(0))
    hooks = [hook for acting in same.extensions for hook in acting.hooks(SimpleNamespace(obs={}))]
    with torch.no_grad():
        found, _ = sampler.run(mixture(process, ways, 0.1), noise, hooks=hooks)
    return found


def test_the_free_value_goes_the_way_that_the_owned_one_went():
    """Drawn by itself it goes so in half of the cases; guided it has the conditional distribution: its mean, its sd."""
    alone, guided = sampled(1, None), sampled(1, FIRST)
    assert 0.4 < (alone[..., 1].mean(1) > 0).float().mean() < 0.6
    assert (guided[..., 1].mean(1) > 0).float().mean() > 0.98
    torch.testing.assert_close(guided[..., 0], torch.full_like(guided[..., 0], 0.7))
    assert abs(float(guided[..., 1].mean()) - 0.7) < 0.03


def test_a_person_goes_on_as_they_are_or_as_they_were_moving():
    recent = np.array([[0.0, 5.0], [1.0, 5.0], [2.0, 8.0]])
    np.testing.assert_allclose(extrapolated(recent, 2), [[2, 8], [2, 8]])
    np.testing.assert_allclose(extrapolated(recent, 3, velocity=True), np.array([[2, 8], [3, 9.5], [4, 11]]))
    np.testing.assert_allclose(extrapolated(recent[:1], 2, velocity=True), [[0, 5], [0, 5]])


@pytest.mark.parametrize(
    ("owned", "values", "match"),
    [
        ([True], [[1.0]], r"expected \[2\]"),
        (FIRST, [[1.0]], r"expected \[2\]"),
        (FIRST, None, r"expected \[2\]"),
        (FIRST, np.zeros((0, 2)), r"expected \[2\]"),
        (FIRST, [[np.inf, 0.0]], "NaN or infinity"),
    ],
)
def test_what_nobody_can_own_is_refused(owned, values, match):
    with pytest.raises(InputError, match=match):
        SharedControl(tiny_policy(demonstrations())).own(owned, values)


@pytest.mark.parametrize("options", [{"rounds": -1}, {"fading": 0}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        SharedControl(tiny_policy(demonstrations()), **options)
