"""Real-time chunking: the next chunk is denoised so that it continues the chunk that is being executed.

While the next chunk is computed the arm goes on with the running one, Y, and what it executes meanwhile is settled. So
the new chunk is guided to agree with Y: fully over the delay d, less and less up to the end of Y, freely after that.

    chunk step       0 … To-1        To-1+d                 To-1+end          H
    running chunk         Y0 Y1 … Y(d-1) Yd ………………… Y(end-1)
    weight                1  1  …  1     decreasing        0                 0
    executed                the running    the new one, from here on
                            one's

Guidance is a vector-Jacobian product through the network (Black, Galliker, Levine, "Real-Time Execution of Action
Chunking Flow Policies", 2025, after ΠGDM, Song et al. 2023). For a flow, x = τ x0 + (1−τ) eps with τ from 0 to 1,

    v ← v + w g,   g = VJP_x[W ⊙ (Y − x̂0)],   w = min(β, (1−τ) / (τ r²)),   r² = (1−τ)² / (τ² + (1−τ)²)

which is x̂0 ← x̂0 + (1−τ) w g. A sample x = a x0 + b eps of any other schedule is a flow's, (a + b) times as large, at
τ = a / (a + b): there it is x̂0 ← x̂0 + (1−τ) w (a + b) VJP_x[W ⊙ (Y − x̂0)]. So one hook serves every scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.process import Step
from action_diffusion.policy.sampler import Hook, StepState

MASKS = ("exponential", "linear", "ones", "hard")
BETA = 5.0
"""The published bound of the guidance weight, for 5 denoising steps."""


def weights(delay: Tensor, end: Tensor, length: int, mask: str = "exponential") -> Tensor:
    """W, [B, length] in [0, 1]: how much each step from now on has to agree with the running chunk.

    Args:
        delay: int [B], steps that will have been executed when the new chunk arrives; W = 1 there. Where the running
            chunk ends before, as many as it has.
        end: int [B], steps that the running chunk has from now on; W = 0 after them, and everywhere where it is 0.
        mask: what lies between, falling from 1 to 0: "exponential", as published, or "linear"; "ones" stays at 1,
            "hard" is 0.
    """
    if mask not in MASKS:
        raise unknown("mask", mask, MASKS)
    step = torch.arange(length, device=delay.device)
    end = end.unsqueeze(-1)
    delay = torch.minimum(delay.unsqueeze(-1), end)
    if mask == "ones":
        return (step < end).float()
    if mask == "hard":
        return (step < delay).float()
    falling = ((delay - 1 - step) / (end - delay + 1) + 1).clamp(0.0, 1.0)
    falling = torch.where(step < end, falling, 0.0)
    return falling if mask == "linear" else falling * torch.expm1(falling) / math.expm1(1.0)


class RealTimeChunking(Hook):
    """Guides chunks to agree with running ones; a row whose weights are all 0 comes out as it would without.

    With epsilon prediction, errors of x̂0 and its Jacobian grow with 1/a, to 2,000 at the noisiest steps. So the
    residual is taken from the clipped estimate, its gradient goes straight through the clip, and the correction is
    never longer than the residual, row by row.

    Args:
        running: Y, [B, H, A] in normalised units, in the action frame of the *new* observation; step i is meant for the
            same instant as step i of the new chunk. Finite where `weight` is above 0; the rest is not looked at.
        weight: W, [B, H].
        beta: the bound of the guidance weight (> 0). The more denoising steps, the larger it may be.
        clip_range: before it is compared with `running`, the estimate is clipped to ± clip_range, or to the largest
            value of the row's `running` where that is larger.
    """

    needs_gradient = True

    def __init__(self, *, running: Tensor, weight: Tensor, beta: float = BETA, clip_range: float = math.inf):
        if running.ndim != 3 or weight.shape != running.shape[:2]:
            raise InputError(f"weights of shape {list(weight.shape)} for running chunks of shape {list(running.shape)}")
        if not beta > 0:
            raise InputError(f"the guidance weight is bounded by beta={beta}, which must be above 0")
        self.weight = weight.unsqueeze(-1).to(running.dtype)
        self.running = torch.where(self.weight > 0, running, 0.0)
        if not self.running.isfinite().all():
            raise InputError("the running chunk holds NaN or infinity where the new one should agree with it")
        self.beta = beta
        self.limit = self.running.abs().amax(dim=(1, 2), keepdim=True).clamp_min(clip_range)

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        if x.shape != self.running.shape:
            raise InputError(f"running chunks of shape {list(self.running.shape)} for new ones of {list(x.shape)}")

    def edit_x0(self, state: StepState) -> Tensor:
        if not (state.x.requires_grad and state.x0_raw.requires_grad):
            raise RuntimeError(
                "real-time chunking differentiates through the network, but its estimate has no gradient with respect "
                "to x: sample outside torch.inference_mode, and with no hook that answers in the network's place"
            )
        further = torch.is_grad_enabled()  # somebody differentiates through the whole sampling run
        estimate = state.x0_hat if further else state.x0_hat.detach()
        residual = self.weight * (self.running - torch.clamp(estimate, -self.limit, self.limit))
        (pull,) = torch.autograd.grad(state.x0_raw, state.x, residual, retain_graph=True, create_graph=further)
        return estimate + _at_most(residual, self._gain(state.step) * pull)

    def _gain(self, step: Step) -> float:
        """(1 − τ) w (a + b)."""
        tau = step.tau
        through = tau * (1.0 - tau)
        weight = self.beta if through == 0 else min(self.beta, (tau**2 + (1.0 - tau) ** 2) / through)
        return (1.0 - tau) * weight * (step.a + step.b)


def continuing(
    policy: DiffusionPolicy,
    obs: Mapping[str, np.ndarray],
    running: Sequence[np.ndarray | None],
    delay: Sequence[int],
    *,
    mask: str = "exponential",
    beta: float = BETA,
) -> RealTimeChunking:
    """The hook for `policy.predict(obs, hooks=[…])` that continues each row's running chunk.

    Args:
        obs: the *new* observations, key → [B, To, …]. A chunk that was learnt in an object's frame is expressed there
            again, because the frame has moved since the running chunk was predicted.
        running: of each row what its running chunk has from now on, [end, A] in the data's units; None for a row
            without one, which then is not guided.
        delay: of each row the steps that the new chunk is expected to take.
    """
    spec, device = policy.spec, policy.device
    now = spec.n_obs_steps - 1
    length = spec.horizon - now
    padded = np.zeros((len(running), spec.horizon, *spec.action.shape), np.float32)
    end = np.zeros(len(running), np.int64)
    for row, rest in enumerate(running):
        if rest is None or not len(rest):
            continue
        rest = rest[:length]
        end[row] = len(rest)
        padded[row, now : now + len(rest)] = rest
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)).to(device) for key, value in obs.items()}
    weight = weights(torch.tensor(delay, device=device), torch.from_numpy(end).to(device), length, mask)
    with torch.no_grad():
        seen = tensors if policy.estimator is None else policy.see(tensors).obs
        normalized = policy.normalize_action(torch.from_numpy(padded).to(device), seen)
    return RealTimeChunking(
        running=normalized,
        weight=torch.nn.functional.pad(weight, (now, 0)),
        beta=beta,
        clip_range=policy.sampler.clip_range if policy.process.family == "diffusion" else math.inf,
    )


def _at_most(bound: Tensor, value: Tensor) -> Tensor:
    """`value` [B, H, A], each row made shorter where it is longer than the row of `bound`."""
    length = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
    limit = torch.linalg.vector_norm(bound, dim=(1, 2), keepdim=True)
    tiny = torch.finfo(value.dtype).tiny
    return value * (limit / length.clamp_min(tiny)).clamp_max(1.0)
