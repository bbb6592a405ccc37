"""Methods on one decision whose best answer is known: chunks are noise of a Gaussian policy, one side earns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gaussian import gaussian_policy

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.extensions.best_of import BestOf
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.steering import NoiseSteering
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.reward.method import Method
from action_diffusion.training.reward.methods.dsrl import Dsrl
from action_diffusion.training.reward.methods.idql import Idql

SMALL: dict[str, Any] = {"hidden": (32, 32), "updates": 4.0, "batch_size": 64, "lr": 3e-3, "warmup": 64, "follow": 0.05}


def observations(n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    return {"state": random.uniform(-1, 1, (n, 1, 5)).astype(np.float32)}


def reward(obs: dict[str, np.ndarray], chunk: np.ndarray) -> torch.Tensor:
    """Of the mean of the executed first numbers, which are N(0, 1.5²): the side that the state's first number says."""
    return torch.as_tensor(np.sign(obs["state"][:, 0, 0]) * chunk[:, :4, 0].mean(axis=1), dtype=torch.float32).tanh()


def train(method: Method, turns: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(turns):
        obs = observations(16, random)
        acted = method.act(obs)
        rows = {name: value for name, value in acted.remembered.items()}
        method.learn(
            rows
            | {
                "reward": reward(obs, acted.chunk),
                "discount": torch.zeros(16),
                "next_condition": acted.remembered["condition"],
            }
        )


def earned(policy: DiffusionPolicy) -> float:
    obs = observations(200, np.random.default_rng(1))
    chunk = policy.predict(obs, noise_generator=torch.Generator().manual_seed(0))["action_pred"]
    return float(reward(obs, chunk).mean())


def test_dsrl_steers_to_the_side_that_earns():
    policy = gaussian_policy(steps=5)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    method = Dsrl(policy, **SMALL, decoded=2)
    train(method, 60)
    assert earned(policy) < 0.2
    policy.extensions = [NoiseSteering(policy, method.fitted()["steering"])]
    assert earned(policy) > 0.85
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_idql_chooses_the_chunk_that_earns():
    policy = gaussian_policy(steps=5)
    method = Idql(policy, **SMALL, n=16, tried=2)
    train(method, 60)
    policy.extensions = [BestOf(policy, method.fitted()["best_of"])]
    assert earned(policy) > 0.75


def test_noises_are_judged_before_they_are_denoised():
    policy = gaussian_policy(steps=5)
    method = Idql(policy, **SMALL, n=1, tried=2, drawn=16)
    train(method, 100)
    policy.extensions = [BestOf(policy, method.fitted()["best_of"])]
    assert policy.extensions[0].candidates == 1
    assert earned(policy) > 0.6


def test_what_is_tried_is_what_is_remembered():
    """The chunk that is executed is the first of the remembered ones, whose noise it came of."""
    policy = gaussian_policy(steps=5)
    obs = observations(3, np.random.default_rng(0))
    for method in (Dsrl(policy, **SMALL), Idql(policy, **SMALL)):
        acted = method.act(obs)
        noise = acted.remembered["noise"][:, 0].view(3, 8, 2).numpy()
        again = policy.predict(obs, noise=noise)
        np.testing.assert_allclose(acted.chunk, again["action_pred"], atol=1e-5)
        first = policy.normalize_action(torch.from_numpy(again["action"]), {}).flatten(1)
        torch.testing.assert_close(acted.remembered["action"][:, 0], first, atol=1e-5, rtol=0)


def test_samplers_whose_noise_does_not_say_the_chunk_are_refused():
    policy = gaussian_policy(steps=5)
    policy.sampler = Sampler(process=policy.process, scheduler="ddim", num_inference_steps=5, eta=1.0)
    with pytest.raises(InputError, match="sampler draws more in its steps"):
        Dsrl(policy)
    with pytest.raises(InputError, match=r"method\.drawn=8"):
        Idql(policy, drawn=8)
    with pytest.raises(InputError, match="extension steering"):
        NoiseSteering(policy, Fitted({}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n=0, expected a whole number from 1"),
        ({"n": 4096}, "n=4096"),
        ({"hidden": [0]}, "hidden=.*expected one to eight sizes"),
        ({"members": True}, "members=True"),
        ({}, "critic.net.weights.0 is missing"),
    ],
)
def test_a_fitted_file_that_does_not_fit_is_refused(options, words):
    policy = gaussian_policy(steps=2)
    whole = {"n": 4, "drawn": 0, "hidden": [8], "members": 2}
    with pytest.raises(InputError, match=words):
        BestOf(policy, Fitted(whole | options))
