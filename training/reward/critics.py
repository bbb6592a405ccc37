"""What critics learn by: losses, averages of weights, and the critic of chunks that methods share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """mean of |τ − 1(error < 0)| · error²: with τ above ½, the prediction of `error = target − prediction` is drawn
    towards the best targets (IQL, Kostrikov et al. 2022, equation 5). A scalar."""
    weight = torch.where(error < 0, 1 - expectile, expectile)
    return (weight * error.square()).mean()


def step(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter], most: float = 10.0
) -> None:
    """One step down the gradient of a loss, its norm at most `most`. Raises `FloatingPointError` for a loss that is not
    finite."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"a loss became {float(loss.detach())}: lower method.lr, or method.critic_lr")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, most)
    optimizer.step()
