"""Real-time chunking: the next chunk is denoised so that it continues the chunk that is being executed.

While the next chunk is computed the arm goes on with the running one, Y, and what it executes meanwhile is fixed. So
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

This w takes what is still open to vary by 1 (normalised units): r² is its variance given x. A policy that is nearly
sure of its chunk, once it has seen the observation, leaves far less open. Its Jacobian, which is that variance up to a
factor, is as much smaller; guidance then hardly moves it, whatever β is. `rounds` >= 1 measures the length of the
correction instead: the one along g that comes nearest to the residual,

    x̂0 ← x̂0 + g ⟨r, g⟩ / ⟨g, g⟩,   g = VJP_x[r],   r = W ⊙ (Y − x̂0)

and goes on so with what is left of the residual. These are the first steps towards the exact conditional mean of a
Gaussian, C W (W C W)⁻¹ r with C ∝ the Jacobian, of which the published form is an approximation for C = r² I.

Guidance alone leaves what is fixed nearly, but not quite, as it is. `pin` sets it: x̂0 is Y over the delay, in every
denoising step, so that the network completes a chunk whose beginning it is given, and a prediction that it has no
freedom to bend still begins where the arm will be.

All this bends a network that never saw a chunk with a beginning. One that was trained to go on from steps that are
prefix (`policy.objective.max_delay`; Black et al., "Training-Time Action Conditioning for Efficient Real-Time
Chunking", 2025) is told which these are, and needs no guidance and no gradients: `Running.prefix`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.action_queue import BETA, MASKS
from action_diffusion.policy.diffusion.sampler import Hook, StepState
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Prefix

LITTLE = 0.1
"""A round that takes away less than this share of what is left (squared) is the last one."""


def weights(delay: Tensor, end: Tensor, length: int, mask: str = "exponential", overlap: int | None = None) -> Tensor:
    """W, [B, length] in [0, 1]: how much each step from now on has to agree with the running chunk.

    Args:
        delay: int [B], steps that will have been executed when the new chunk arrives; W = 1 there. Where the running
            chunk ends before, as many as it has.
        end: int [B], steps that the running chunk has from now on; W = 0 after them, and everywhere where it is 0.
        mask: what lies between, falling from 1 to 0: "exponential", as published, or "linear"; "ones" stays at 1,
            "hard" is 0.
        overlap: W = 0 from so many steps after the delay on; None for only where the running chunk ends, as published.
            The shorter, the more the new chunk may differ from a plan that is older than its observation.
    """
    if mask not in MASKS:
        raise unknown("mask", mask, MASKS)
    step = torch.arange(length, device=delay.device)
    end = end.unsqueeze(-1)
    delay = torch.minimum(delay.unsqueeze(-1), end)
    if overlap is not None:
        end = torch.minimum(end, delay + overlap)
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
        rounds: 0 for the published guidance weight; otherwise the length of the correction is measured, and so many
            products are taken in a denoising step at most. beta then has no effect.
        pinned: bool [B, H], where the estimate is set to `running`, which has to be finite there; None for nowhere.
        clip_range: before it is compared with `running`, the estimate is clipped to ± clip_range, or to the largest
            value of the row's `running` where that is larger.
    """

    needs_gradient = True

    def __init__(
        self,
        *,
        running: Tensor,
        weight: Tensor,
        beta: float = BETA,
        rounds: int = 0,
        pinned: Tensor | None = None,
        clip_range: float = math.inf,
    ):
        if running.ndim != 3 or weight.shape != running.shape[:2]:
            raise InputError(f"weights of shape {list(weight.shape)} for running chunks of shape {list(running.shape)}")
        if not beta > 0:
            raise InputError(f"the guidance weight is bounded by beta={beta}, which must be above 0")
        if rounds < 0:
            raise InputError(f"rounds={rounds} of guidance in a denoising step: 0 or more")
        self.weight = weight.unsqueeze(-1).to(running.dtype)
        self.running = torch.where(self.weight > 0, running, 0.0)
        if not self.running.isfinite().all():
            raise InputError("the running chunk holds NaN or infinity where the new one should agree with it")
        self.beta = beta
        self.rounds = rounds
        self.pinned = None if pinned is None else pinned.unsqueeze(-1)
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
        estimate = state.x0_hat if torch.is_grad_enabled() else state.x0_hat.detach()
        residual = self.weight * (self.running - torch.clamp(estimate, -self.limit, self.limit))
        if self.rounds == 0:
            guided = estimate + _at_most(residual, self._gain(state.step) * _pull(state, residual))
        else:
            guided = estimate + fitted(state, lambda correction: residual - self.weight * correction, self.rounds)
        return guided if self.pinned is None else torch.where(self.pinned, self.running, guided)

    def _gain(self, step: Step) -> float:
        """(1 − τ) w (a + b)."""
        tau = step.tau
        through = tau * (1.0 - tau)
        weight = self.beta if through == 0 else min(self.beta, (tau**2 + (1.0 - tau) ** 2) / through)
        return (1.0 - tau) * weight * (step.a + step.b)


@dataclass(frozen=True)
class RunningChunks:
    """What arms execute while new chunks are computed, as these see it. See `running_chunks`.

    action: [B, H, A], normalised, in the action frame of the new observations. delay, end: int [B], steps from now on
    that are fixed, and that there are. now: the step of a chunk that is now, To-1.
    """

    action: Tensor
    delay: Tensor
    end: Tensor
    now: int

    def weights(self, mask: str, overlap: int | None = None) -> Tensor:
        """W, [B, H]."""
        length = self.action.shape[1] - self.now
        return torch.nn.functional.pad(weights(self.delay, self.end, length, mask, overlap), (self.now, 0))

    def prefix(self) -> Prefix:
        """For a policy that was trained to go on from such steps (`DiffusionPolicy.max_delay`)."""
        steps = self.weights("hard") > 0
        return Prefix(torch.where(steps.unsqueeze(-1), self.action, 0.0), steps)


def running_chunks(
    policy: DiffusionPolicy,
    obs: Mapping[str, np.ndarray],
    running: Sequence[np.ndarray | None],
    delay: Sequence[int],
) -> RunningChunks:
    """Running chunks as `policy` would have predicted them from the *new* observations.

    A chunk that was learnt in an object's frame is expressed there again, because the frame has moved meanwhile.

    Args:
        obs: the new observations, key → [B, To, …].
        running: of each row what its running chunk has from now on, [end, A] in the data's units; None for a row
            without one.
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
        padded[row, :now] = rest[0]  # what is past: rotations go on from it
        padded[row, now : now + len(rest)] = rest
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)).to(device) for key, value in obs.items()}
    with torch.no_grad():
        seen = tensors if policy.estimator is None else policy.see(tensors).obs
        normalized = policy.normalize_action(torch.from_numpy(padded).to(device), seen)
    return RunningChunks(normalized, torch.tensor(delay, device=device), torch.from_numpy(end).to(device), now)


def continuing(
    policy: DiffusionPolicy,
    running: RunningChunks,
    *,
    mask: str = "exponential",
    beta: float = BETA,
    rounds: int = 0,
    overlap: int | None = None,
    pin: bool = True,
) -> RealTimeChunking:
    """The hook for `policy.predict(obs, hooks=[…])` that guides each row to continue its running chunk, if it has one.

    pin: set what is fixed, beside guiding towards it.
    """
    return RealTimeChunking(
        running=running.action,
        weight=running.weights(mask, overlap),
        beta=beta,
        rounds=rounds,
        pinned=running.weights("hard") > 0 if pin else None,
        clip_range=policy.sampler.reach if policy.process.family == "diffusion" else math.inf,
    )


def fitted(state: StepState, left: Callable[[Tensor], Tensor], rounds: int) -> Tensor:
    """The correction [B, H, A] of the estimate, of at most `rounds` rounds; a row ends where they bring little.

    left: of a correction, the residual that it leaves, [B, H, A].
    """
    correction = torch.zeros_like(state.x0_hat)
    going = torch.ones_like(correction[:, :1, :1])
    for _ in range(rounds):
        residual = left(correction)
        pull = _pull(state, residual)
        along, square, length = _dot(residual, pull), _dot(pull, pull), _dot(residual, residual)
        tiny = torch.finfo(residual.dtype).tiny
        step = (along / square.clamp_min(tiny)).clamp_min(0.0)  # backwards would be noise of the Jacobian
        correction = correction + going * step * pull
        going = going * (step * along > LITTLE * length)
        if not going.any():
            break
    return correction


def _pull(state: StepState, residual: Tensor) -> Tensor:
    """VJP_x[residual] through the network, [B, H, A]; differentiable where somebody differentiates the whole run."""
    further = torch.is_grad_enabled()
    (pull,) = torch.autograd.grad(state.x0_raw, state.x, residual, retain_graph=True, create_graph=further)
    return pull


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Of each row, [B, 1, 1]."""
    return (first * second).sum(dim=(1, 2), keepdim=True)


def _at_most(bound: Tensor, value: Tensor) -> Tensor:
    """`value` [B, H, A], each row made shorter where it is longer than the row of `bound`."""
    length = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
    limit = torch.linalg.vector_norm(bound, dim=(1, 2), keepdim=True)
    tiny = torch.finfo(value.dtype).tiny
    result: Tensor = value * (limit / length.clamp_min(tiny)).clamp_max(1.0)
    return result
