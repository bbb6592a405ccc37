"""Optimizers that critics learn with.

`AdamO` is Adam that stays near the direction of the gradient. What a critic learns from its own estimates is stable as
long as a step moves V(s) more than the target γ V(s') that it is drawn to: K(s, s) > γ K(s', s), K(s', s) = ∇V(s')ᵀ D
∇V(s), D what the optimizer makes of a gradient. A gradient's own step, D = I, may well be stable where Adam's is not,
since Adam moves each weight by nearly as much, however little V(s) depends on it and however much V(s') does (Qiao et
al. 2026, "AdamO: A Collapse-Suppressed Optimizer for Offline RL").

    Adam's step        d = −m̂ / (√v̂ + ε)
    its two parts      d = d∥ + d⊥,   d∥ along the gradient g, d⊥ orthogonal to it
    AdamO              θ ← θ + lr · (d∥ + d⊥ · min(1, β ‖d∥‖ / ‖d⊥‖)),   tensor by tensor

With β = 0 each tensor goes down its gradient, as far as Adam would have gone along it. Decided here: the paper corrects
by orthogonality as well, decoupled from the gradient and within a budget of alignment with the task, but its formula is
not in what is public of it; what is bounded here by such a budget, β, is what in Adam's step is orthogonal to the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from action_diffusion.errors import InputError


class AdamO(torch.optim.Optimizer):
    """betas, eps: as of Adam. budget: β, at least 0; infinite: Adam. Raises `InputError` for a negative one."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        budget: float = 0.1,
    ) -> None:
        if not budget >= 0:
            raise InputError(f"adamo: budget={budget:g}, expected 0 or more")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "budget": budget})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(self._move(parameter.grad, self.state[parameter], group), alpha=group["lr"])

    def _move(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state |= {"step": torch.tensor(0.0)}  # a tensor, as checkpoints have it
            state |= {name: torch.zeros_like(gradient) for name in ("mean", "square")}
        state["step"] += 1
        (first, second), steps = group["betas"], float(state["step"])
        mean = state["mean"].lerp_(gradient, 1 - first)
        square = state["square"].lerp_(gradient.square(), 1 - second)
        spread = (square / (1 - second**steps)).sqrt() + group["eps"]
        return aligned(-mean / (1 - first**steps) / spread, gradient, group["budget"])


def aligned(move: Tensor, gradient: Tensor, budget: float) -> Tensor:
    """A move with what is orthogonal to the gradient at most `budget` times as long as what is along it."""
    tiny = torch.finfo(move.dtype).tiny
    unit = gradient / gradient.norm().clamp_min(tiny)
    along: Tensor = (move * unit).sum() * unit
    across = move - along
    share = budget * along.norm() / across.norm().clamp_min(tiny)
    kept: Tensor = across * share.nan_to_num(nan=1.0).clamp_max(1.0)  # no number: an infinite budget of nothing
    return along + kept


OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamo": AdamO}
"""By their names as options."""

__all__ = ["OPTIMIZERS", "AdamO", "aligned"]
