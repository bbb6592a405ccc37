"""Methods on one decision whose best answer is known: chunks are noise of a Gaussian policy, one side earns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gaussian import gaussian_policy
from tiny import demonstrations, tiny_policy

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.extensions.best_of import BestOf
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.steering import Steering
from action_diffusion.policy.extensions.transport import Transport
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.reward.method import Method
from action_diffusion.training.reward.methods.dppo import Dppo
from action_diffusion.training.reward.methods.dsrl import Dsrl
from action_diffusion.training.reward.methods.dsrl_sac import DsrlSac
from action_diffusion.training.reward.methods.fisher import Fisher, score
from action_diffusion.training.reward.methods.fmq import Fmq
from action_diffusion.training.reward.methods.idql import Idql
from action_diffusion.training.reward.policy_gradient import advantages, surrogate

SMALL: dict[str, Any] = {
    **{"hidden": (32, 32), "octaves": 0, "updates": 1.0, "batch_size": 64},
    **{"lr": 3e-3, "warmup": 64, "follow": 0.05},
}


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
                "simulator": torch.arange(16.0),
                "time": torch.zeros(16),
            }
        )


def earned(policy: DiffusionPolicy) -> float:
    obs = observations(200, np.random.default_rng(1))
    chunk = policy.predict(obs, noise_generator=torch.Generator().manual_seed(0))["action_pred"]
    return float(reward(obs, chunk).mean())


def steered(name: str, policy: DiffusionPolicy) -> Method:
    if name == "dsrl_sac":
        return DsrlSac(policy, **SMALL, frequencies=8, entropy=-1.0)
    sizes: dict[str, Any] = {"chunks": 64, "batch_size": 64, "hidden": (32, 32), "octaves": 0}
    return Dsrl(policy, **sizes, lr=1e-2, epochs=10, most_kl=0.5)


@pytest.mark.parametrize(("name", "turns"), [("dsrl", 120), ("dsrl_sac", 90)])
def test_dsrl_steers_to_the_side_that_earns(name, turns):
    policy = gaussian_policy(steps=5)
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    method = steered(name, policy)
    train(method, turns)
    assert earned(policy) < 0.2
    policy.extensions = [Steering(policy, method.fitted()["steering"])]
    assert earned(policy) > 0.85
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_idql_chooses_the_chunk_that_earns():
    policy = gaussian_policy(steps=5)
    method = Idql(policy, **SMALL, n=16, tried=2)
    train(method, 50)
    policy.extensions = [BestOf(policy, method.fitted()["best_of"])]
    assert earned(policy) > 0.75


def test_noises_are_judged_before_they_are_denoised():
    policy = gaussian_policy(steps=5)
    method = Idql(policy, **SMALL, n=1, tried=2, drawn=16)
    train(method, 80)
    policy.extensions = [BestOf(policy, method.fitted()["best_of"])]
    assert policy.extensions[0].candidates == 1
    assert earned(policy) > 0.6


def test_what_is_tried_is_what_is_remembered():
    """The chunk that is executed is the first of the remembered ones, whose noise it came of."""
    policy = gaussian_policy(steps=5)
    obs = observations(3, np.random.default_rng(0))
    for method in (DsrlSac(policy, **SMALL, frequencies=8), Idql(policy, **SMALL)):
        acted = method.act(obs)
        noise = acted.remembered["noise"][:, 0].view(3, 8, 2)
        if isinstance(method, DsrlSac):
            noise = method.frequencies.put(torch.zeros(3, 8, 2), noise.flatten(1))
        again = policy.predict(obs, noise=noise.numpy())
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
        Steering(policy, Fitted({}))


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
    whole = {"n": 4, "drawn": 0, "hidden": [8], "octaves": 0, "members": 2}
    with pytest.raises(InputError, match=words):
        BestOf(policy, Fitted(whole | options))


def test_policy_gradients_move_the_policy_to_the_side_that_earns():
    torch.manual_seed(0)
    policy = tiny_policy(demonstrations(), sampler={"scheduler": "ddim", "num_inference_steps": 5})
    method = Dppo(policy, chunks=64, floor=0.3, lr=3e-3, epochs=4, batch_size=64, hidden=(32,), most_kl=1.0)
    random = np.random.default_rng(0)

    def mean(chunk):
        return torch.as_tensor(chunk)[:, 1:5, 0].mean(dim=1)

    middle, told = float(mean(method.act(seen(64, random)).chunk).mean()), []
    for _ in range(20):
        obs = seen(64, random)
        acted = method.act(obs)
        reward = torch.tanh((mean(acted.chunk) - middle) / 5).float()
        condition = acted.remembered["condition"]
        rows = {**acted.remembered, "reward": reward, "discount": torch.zeros(64), "next_condition": condition}
        method.learn(rows | {"simulator": torch.arange(64.0), "time": torch.zeros(64)})
        told.append(float(reward.mean()))
    assert np.mean(told[-5:]) > np.mean(told[:5]) + 0.3


def seen(n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    return {"state": random.normal(100, 5, (n, 2, 5)).astype(np.float32)}


def test_the_ratio_is_one_before_the_first_update():
    """The density of what was tried, said again by the same weights; a step's is that of its own normal."""
    policy = gaussian_policy(steps=5)
    method = Dppo(policy, floor=0.2, trained=3)
    acted = method.act(observations(4, np.random.default_rng(0)))
    rows = dict(acted.remembered)
    assert rows["before"].shape == (4, 3, 8, 2)
    density = method._log_density(rows, torch.arange(4))
    z = (rows["after"] - torch.stack([means(policy, rows, index) for index in range(3)], dim=1)) / 0.2
    expected = torch.distributions.Normal(0, 0.2).log_prob(0.2 * z)[:, :, 0:4].flatten(2).mean(2)
    torch.testing.assert_close(density, expected)


def means(policy: DiffusionPolicy, rows: dict[str, torch.Tensor], index: int) -> torch.Tensor:
    """Of a Gaussian policy's step: x0 of x by the posterior mean, then DDIM's equation 12 without noise."""
    step, x = policy.sampler.steps[2 + index], rows["before"][:, index]
    x0 = step.a * 0.3**2 / (step.a**2 * 0.3**2 + step.b**2) * x
    last = index == 2
    a, b = (1.0, 0.0) if last else (policy.sampler.steps[3 + index].a, policy.sampler.steps[3 + index].b)
    return a * x0 + b * (x - step.a * x0) / step.b


def test_the_clipped_surrogate_is_ppos():
    ratio, advantage = torch.tensor([[1.5, 0.5]]), torch.tensor([2.0])
    found = surrogate(ratio, advantage, torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.2]))
    assert float(found) == pytest.approx(-(1.1 * 1.0 + 0.5 * 2.0) / 2)


def test_advantages_follow_an_episode_and_no_further():
    """Two simulators; the second row of the first begins another episode."""
    error = torch.tensor([1.0, 10.0, 2.0, 3.0])
    found = advantages(
        error,
        torch.tensor([0.5, 0.5, 0.5, 0.0]),
        torch.tensor([0.0, 1.0, 0.0, 1.0]),
        torch.tensor([4.0, 0.0, 0.0, 4.0]),
    )
    assert found.tolist() == [1.0, 10 + 0.5 * 3, 2.0, 3.0]


def flow_map(steps: int = 1) -> DiffusionPolicy:
    sampler = {"scheduler": "flow", "num_inference_steps": steps, "clip": None}
    return tiny_policy(
        demonstrations(), process={"name": "flow"}, objective={"name": "flow_map"}, sampler=sampler
    ).requires_grad_(False)


def test_fmq_moves_chunks_of_one_step_uphill_and_no_further_than_the_radius():
    torch.manual_seed(0)
    method = Fmq(flow_map(), **SMALL | {"updates": 0.25}, step=0.1, radius=0.3, policy_lr=1e-2)
    random, told = np.random.default_rng(0), []

    def mean(chunk):
        return torch.as_tensor(chunk)[:, 1:5, 0].mean(dim=1).float()

    middle = float(mean(method.act(seen(64, random)).chunk).mean())
    for _ in range(40):
        acted = method.act(seen(16, random))
        reward = torch.tanh((mean(acted.chunk) - middle) / 5)
        condition = acted.remembered["condition"]
        method.learn({**acted.remembered, "reward": reward, "discount": torch.zeros(16), "next_condition": condition})
        told.append(float(reward.mean()))
    assert np.mean(told[-5:]) > np.mean(told[:5]) + 0.1
    rows = method.rows.newest(64)
    noise = torch.randn(64, 8, 2, generator=torch.Generator().manual_seed(0))
    chunk, anchor = (
        method._jump(denoiser, rows["condition"], noise)[:, 1:5].detach()
        for denoiser in (method.policy.denoiser, method.anchor)
    )
    moved = (chunk - anchor).square().mean(dim=(1, 2)).sqrt()
    assert 0.05 < float(moved.mean()) < 0.35


def test_the_jump_is_what_the_policy_samples():
    method = Fmq(flow_map(), **SMALL)
    acted = method.act(seen(3, np.random.default_rng(0)))
    method.random.manual_seed(0)
    again = method.acted(dict(acted.remembered))
    torch.testing.assert_close(again, acted.remembered["action"])


def test_policies_that_are_no_flow_maps_of_one_step_are_refused():
    for policy in (gaussian_policy(steps=5), flow_map(2)):
        with pytest.raises(InputError, match=r"sampler\.num_inference_steps=1"):
            Fmq(policy)


def test_the_score_is_that_of_the_noisy_policy():
    """N(0, s²) made noisy is N(0, a² s² + b²)."""
    policy = gaussian_policy(0.3, steps=5)
    at = policy.sampler.steps[3]
    x = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(0))
    found = score(policy, torch.zeros(4, 5), x, 3)
    torch.testing.assert_close(found, -x / (at.a**2 * 0.3**2 + at.b**2))


def test_the_map_moves_chunks_to_the_side_that_earns_and_keeps_its_budget():
    policy = gaussian_policy(steps=5)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    method = Fisher(policy, **SMALL, divergence=0.05, noise=0.9, scores=4)
    base = earned(policy)
    train(method, 60)
    policy.extensions = [Transport(policy, method.fitted()["transport"])]
    assert earned(policy) > base + 0.3
    rows = method.rows.newest(256)
    moved = method.map(rows["condition"], rows["base"]).detach()
    assert float(moved.square().mean()) == pytest.approx(0.05, rel=0.5)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    with pytest.raises(InputError, match="extension transport: bound"):
        Transport(policy, Fitted({}))
