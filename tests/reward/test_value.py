"""Networks and losses of critics, against values that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from action_diffusion.policy.value.averages import averaged_copy, follow
from action_diffusion.policy.value.networks import EnsembleMlp, Value
from action_diffusion.policy.value.noise import Frequencies, NoiseActor
from action_diffusion.training.reward.critics import expectile_loss, step


def test_members_of_an_ensemble_do_not_know_each_other():
    torch.manual_seed(0)
    net = EnsembleMlp(input_dim=3, hidden=(8,), output_dim=2, members=3)
    x = torch.randn(5, 3)
    said = net(x)
    assert said.shape == (3, 5, 2)
    assert not torch.allclose(said[0], said[1])
    said[1].sum().backward()
    assert [float(weight.grad[0].abs().sum()) for weight in net.weights] == [0, 0]


def test_the_density_of_a_noise_is_that_of_a_squashed_normal():
    torch.manual_seed(0)
    actor = NoiseActor(condition_dim=2, dim=1, bound=1.5)
    condition = torch.randn(1, 2)
    drawn, density = actor.draw(condition.expand(200_000, 2), torch.randn(200_000, 1))
    assert float(drawn.detach().abs().max()) <= 1.5
    counts, edges = np.histogram(drawn.detach().numpy(), bins=20, range=(-1.2, 1.2))
    middle = torch.tensor((edges[1:] + edges[:-1]) / 2, dtype=torch.float32)
    measured = counts / len(drawn) / (edges[1] - edges[0])
    mean, log_std = actor.moments(condition)
    before = 1.5 * torch.atanh(middle / 1.5)
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = (normal.log_prob(before) - torch.log(1 - (middle / 1.5) ** 2)).exp().detach().numpy()[0]
    np.testing.assert_allclose(measured, expected, rtol=0.05, atol=0.01)
    near = (drawn.detach() - middle).abs().argmin(dim=0)
    np.testing.assert_allclose(density.detach().exp()[near].numpy(), expected, rtol=0.01)


def test_a_noise_actor_begins_as_plain_noise():
    actor = NoiseActor(condition_dim=3, dim=4, bound=5.0)
    mean, log_std = actor.moments(torch.randn(10, 3))
    assert float(mean.detach().abs().max()) < 0.05
    assert float(log_std.detach().abs().max()) < 0.05


def test_frequencies_of_noise_are_put_back_where_they_were():
    noise, frequencies = torch.randn(5, 8, 2), Frequencies(8, 3)
    torch.testing.assert_close(frequencies.put(noise, frequencies.of(noise)), noise)
    changed = frequencies.put(noise, torch.zeros(5, 6))
    torch.testing.assert_close(frequencies.of(changed), torch.zeros(5, 6), atol=1e-6, rtol=0)
    whole = Frequencies(8, 8)
    torch.testing.assert_close(whole.of(changed).view(5, 8, 2)[:, 3:], whole.of(noise).view(5, 8, 2)[:, 3:])
    constant = torch.ones(1, 8, 1)
    torch.testing.assert_close(whole.of(constant)[0, 0], torch.tensor(8**0.5))


def test_an_expectile_leans_to_the_best():
    """τ = ½ is half the mean squared error; the 0.9-expectile of 0 and 1 is 0.9."""
    target = torch.tensor([0.0, 1.0])
    assert float(expectile_loss(target, 0.5)) == pytest.approx(0.25)
    value = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([value], lr=0.5)
    for _ in range(200):
        step(optimizer, expectile_loss(target - value, 0.9), [value])
    assert float(value.detach()) == pytest.approx(0.9, abs=1e-3)


def test_a_loss_that_is_not_finite_is_named():
    value = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(FloatingPointError, match="a loss became nan"):
        step(torch.optim.SGD([value], lr=0.1), value / 0.0 * 0.0, [value])


def test_a_critic_learns_the_values_of_a_chain():
    """States 0 … 4, one step to the right each, a reward of −1 until the end: V(s) = −Σ γ^i over the 5 − s steps."""
    torch.manual_seed(0)
    states, gamma = torch.eye(5), 0.9
    following = torch.cat([states[1:], states[:1]])
    discount = torch.tensor([gamma] * 4 + [0.0])
    critic = Value(condition_dim=5, hidden=(64,), members=2)
    target, optimizer = averaged_copy(critic), torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(1500):
        with torch.no_grad():
            goal = -1 + discount * target(following).amin(0)
        step(optimizer, (critic(states) - goal).square().mean(), critic.parameters())
        follow(target, critic, 0.05)
    expected = -torch.tensor([sum(gamma**i for i in range(5 - s)) for s in range(5)])
    torch.testing.assert_close(critic(states).mean(0).detach(), expected, rtol=0.02, atol=0.02)
