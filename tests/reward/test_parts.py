"""Parts of learning from reward, each against a case whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.training.reward.methods.fisher import fisher_quadratic
from action_diffusion.training.reward.methods.fmq import guided
from action_diffusion.training.reward.optimizers import AdamO, aligned
from action_diffusion.training.reward.returns import ReturnFlow, path_coupled_loss, wasserstein


def test_the_guided_target_of_a_linear_critic_is_the_edge_of_the_trust_region():
    """a₀ + ρ g / ‖g‖, after steps of η; the norm is a root mean square."""
    anchor, gradient = torch.tensor([[0.1, -0.2, 0.3, 0.0]]), torch.tensor([[3.0, 0.0, -4.0, 0.0]])
    action = anchor.clone()
    first = guided(action, anchor, gradient, 0.1, 0.3)
    torch.testing.assert_close(first - anchor, 0.1 * gradient / 2.5)
    for _ in range(10):
        action = guided(action, anchor, gradient, 0.1, 0.3)
    torch.testing.assert_close(action, anchor + 0.3 * gradient / 2.5)
    torch.testing.assert_close(guided(anchor, anchor, torch.zeros_like(anchor), 0.1, 0.3), anchor)


def test_the_fisher_quadratic_is_the_square_where_all_directions_are_alike_and_not_elsewhere():
    moved = torch.tensor([[0.3, 0.4], [0.3, 0.4]])
    alike = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    across = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    found = fisher_quadratic(moved, torch.stack([alike, across]), 0.0)
    torch.testing.assert_close(found, torch.tensor([0.25 / 2, 0.09]))
    damped = fisher_quadratic(moved, torch.stack([alike, across]), 0.1)
    torch.testing.assert_close(damped - found, torch.full((2,), 0.1 * 0.125))


def test_a_move_keeps_what_is_along_the_gradient_and_little_of_the_rest():
    move, gradient = torch.tensor([3.0, 4.0]), torch.tensor([-2.0, 0.0])
    torch.testing.assert_close(aligned(move, gradient, 0.0), torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(aligned(move, gradient, 0.5), torch.tensor([3.0, 1.5]))
    torch.testing.assert_close(aligned(move, gradient, torch.inf), move)
    torch.testing.assert_close(aligned(move, torch.zeros(2), 0.5), torch.zeros(2))
    torch.testing.assert_close(aligned(move, torch.zeros(2), torch.inf), move)


def test_adamo_without_a_budget_is_adam():
    twins = [torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]])) for _ in range(2)]
    optimizers = [AdamO(twins[:1], lr=0.05, budget=torch.inf), torch.optim.Adam(twins[1:], lr=0.05)]
    for _ in range(20):
        for twin, optimizer in zip(twins, optimizers, strict=True):
            optimizer.zero_grad()
            (twin * torch.tensor([1.0, 10.0])).sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(twins[0], twins[1])
    with pytest.raises(InputError, match="budget=-1"):
        AdamO(twins, budget=-1)


@pytest.mark.parametrize(("make", "converges"), [(AdamO, True), (torch.optim.Adam, False)])
def test_values_that_adam_runs_away_from(make, converges):
    """V = x · θ of s₁ → s₂ → end with 1; s₂ is seen rarely (`benchmarks.reward.adamo`)."""
    features, seen = torch.tensor([[1.0, 0.05], [0.3, 1.5]]), torch.tensor([1.0, 0.003])
    theta = torch.nn.Parameter(torch.zeros(2))
    optimizer = make([theta], lr=0.02)
    for _ in range(1500):
        said = features @ theta.detach()
        aim = torch.stack([0.9 * said[1], torch.tensor(1.0)])
        theta.grad = -features.T @ (seen * (aim - said))
        optimizer.step()
    error = float((features @ theta.detach() - torch.tensor([0.9, 1.0])).abs().max())
    assert error < 0.05 if converges else error > 5


class Known(ReturnFlow):
    """Brings noise to m + s ε: the velocity of the straight path to N(m, s²), told by the condition [B, 2]."""

    def velocity(self, t: Tensor, z: Tensor, *seen: Tensor) -> Tensor:
        m, s = seen[0].unbind(dim=1)
        eps = (z - t * m) / (1 - t + t * s)
        return m + (s - 1) * eps


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_the_flow_that_solves_the_bellman_equation_has_no_loss(coupling):
    """r is fixed, and the same ε leads to both returns: Z = r + γ (m' + s' ε). A wrong mean costs its square."""
    flow = Known(condition_dim=2, hidden=(4,), steps=4)
    following = torch.tensor([[2.0, 0.5]]).expand(64, 2)
    now = torch.tensor([[1.0 + 0.9 * 2.0, 0.9 * 0.5]]).expand(64, 2)
    rows = {"condition": now, "next_condition": following, "reward": torch.ones(64), "discount": torch.full((64,), 0.9)}
    generator = torch.Generator().manual_seed(0)
    assert float(path_coupled_loss(flow, flow, rows, coupling=coupling, generator=generator)) < 1e-8
    ended = rows | {"discount": torch.zeros(64), "condition": torch.tensor([[1.0, 1e-6]]).expand(64, 2)}
    assert float(path_coupled_loss(flow, flow, ended, coupling=coupling, generator=generator)) < 1e-6
    wrong = ended | {"condition": torch.tensor([[1.0, 1.0]]).expand(64, 2)}
    assert float(path_coupled_loss(flow, flow, wrong, coupling=coupling, generator=generator)) > 0.2


def test_draws_of_a_flow_are_spread_as_its_returns_are():
    flow = Known(condition_dim=2, hidden=(4,), steps=3, scale=2.0)
    eps = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[1.5, 0.5]])
    assert wasserstein(flow.draw(eps, seen.expand(2000, 2)), 3.0 + 1.0 * eps) < 1e-5
    mean = flow.mean(4000, seen, generator=torch.Generator().manual_seed(1))
    assert mean.shape == (1,)
    assert float(mean) == pytest.approx(3.0, abs=0.05)


def test_the_wasserstein_distance_is_that_of_a_shift():
    a = torch.from_numpy(np.random.default_rng(0).normal(size=100))
    assert wasserstein(a, a.flip(0) + 0.25) == pytest.approx(0.25)
