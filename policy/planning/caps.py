"""Plans whose total stays within what is left to spend: energy, material, wear, money.

    Σ_ij c_j |x_ij|  ≤  rate · (steps so far + steps of the plan) − spent

over the steps of a plan and its columns, x in the data's units, c_j ≥ 0 what a unit of a column costs. A plan that
would spend more is replaced by the nearest one that does not. By Lagrange's dual that is known without iterations, each
value is lowered by its price (Chen et al. 2026, "D3-Subsidy", embed caps by such a mapping; the projection is Duchi et
al. 2008, "Efficient Projections onto the l1-Ball"):

    x_ij ← sign(x_ij) · max(|x_ij| − λ c_j, 0),   λ so that the total is what is left

so small values go first, and large ones keep their shape. Within the denoising loop every estimate is mapped, so that
the rest of the steps completes a plan of that total; the last one is mapped once more, so that what comes out keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import Hook, StepState
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded


def allowance(rate: float, steps: int, spent: Tensor) -> Tensor:
    """What is left [B] after so many steps, those of the plan counted as well, of which `spent` [B] is gone; 0 where
    nothing is."""
    return (rate * steps - spent).clamp_min(0.0)


def capped(plan: Tensor, left: Tensor, cost: Tensor) -> Tensor:
    """The nearest plans [B, H, A] to some whose total cost is at most `left` [B]. cost: of a unit of each column, [A],
    at least 0; a column that costs nothing stays as it is.

    Raises `InputError` for costs or rests below 0, or no numbers.
    """
    if not (cost >= 0).all() or not (left >= 0).all() or cost.shape != plan.shape[2:] or left.shape != plan.shape[:1]:
        raise InputError(
            f"caps: cost={cost.tolist()} of {plan.shape[2]} columns, and {list(left.shape)} rests for {len(plan)} "
            "plans: expected one number of each, 0 or more"
        )
    price = cost.expand_as(plan).flatten(1)
    size = plan.abs().flatten(1)
    # λ lies between two of the |x| / c at which values reach 0, and the total is linear between them.
    threshold, order = torch.where(price > 0, size / price, -1.0).sort(dim=1, descending=True)
    paid = price.gather(1, order)
    spent, slope = (paid * size.gather(1, order)).cumsum(1), paid.square().cumsum(1)
    needed = (spent - left.unsqueeze(1)) / slope.clamp_min(torch.finfo(size.dtype).tiny)
    last = ((needed < threshold).sum(dim=1, keepdim=True) - 1).clamp_min(0)
    dual = needed.gather(1, last)
    total = (price * size).sum(dim=1, keepdim=True)
    lower = torch.where(total > left.unsqueeze(1), dual, 0.0) * price
    return plan.sign() * (size - lower).clamp_min(0.0).view_as(plan)


class Caps(Hook):
    """Keeps the plans of one sampling run to what is `left` [B] to spend. cost [A]: as of `capped`. The last hook of
    the list. seen: of the policy's observations, one row a plan."""

    def __init__(self, policy: DiffusionPolicy, seen: Encoded, left: Tensor, cost: Tensor) -> None:
        self.policy, self.seen, self.left, self.cost = policy, seen, left, cost

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        self._last = len(steps) - 1

    def edit_x0(self, state: StepState) -> Tensor:
        return self._mapped(state.x0_hat)

    def after_step(self, state: StepState, x_next: Tensor) -> Tensor:
        return self._mapped(x_next) if state.k == self._last else x_next

    def _mapped(self, normalized: Tensor) -> Tensor:
        plan = self.policy.unnormalize_action(normalized, self.seen.obs)
        return self.policy.normalize_action(capped(plan, self.left, self.cost), self.seen.obs)


__all__ = ["Caps", "allowance", "capped"]
