"""Long plans from overlapping chunks of a policy that was trained on short ones.

    chunk 1   ├───────────┤
    chunk 2            ├──┼────────┤                 K chunks of H steps, `overlap` V:  L = K H − (K − 1) V
    chunk 3                     ├──┼────────┤
    plan      start ──────────────────────── goal

The density of the plan is taken to be that of its chunks over that of their overlaps, p(plan) ∝ Π p(chunk_k) /
Π p(overlap_k). Plain composition (DiffCollage, Zhang et al. 2023; GSC, Mishra et al. 2023) denoises all chunks at once,
lets them share the noise where they overlap, and in every step sets the estimates there to their mean, and the ends of
the plan to start and goal:

    x̂0 ← agree(x̂0),   agree = cut ∘ pinned ∘ mean over overlaps

Where a chunk may go several ways, neighbours choose different ones, and their mean goes neither way: through a wall.
Refined composition ("Refining Compositional Diffusion for Reliable Long-Horizon Planning", RCD, 2026) sees that in the
error by which the policy reconstructs its own estimate: what is likely survives being made noisy and denoised, a mean
of two ways does not. At the noise (a, b) of each denoising step,

    r = D(a x̂0 + b z),   E(x̂0) = ½ ‖x̂0 − r‖² + ½ c ‖r − agree(r)‖²      reconstruction, and consistency of overlaps

and `rounds` times x̂0 ← agree(x̂0 − ∇E), z drawn anew each time. Decided here: r counts as a constant in ∇E, as is usual
where a network judges its own estimates (DreamFusion, Poole et al. 2023); then x̂0 − ∇E = r whatever c is, `agree` is
the nearest without a gap, and no gradient goes through the network.

Neighbours have to find a common way while the noise still leaves them the choice. So a finished plan is made noisy and
denoised again (`Restart`), from less noise each time: `restarts`. Of several plans for the same ends, the one with the
least E is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.diffusion.sampler import DenoiserCall, Hook, StepState, draw_noise
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.planning.restart import Restart
from action_diffusion.policy.policy import DiffusionPolicy

RESTARTS = (0.97, 0.95, 0.93, 0.9)
"""Where a plan is made noisy again, as shares of noise b."""
JUDGED_AT = 0.3
"""The share of noise, nearly, at which finished plans are judged."""


@dataclass(frozen=True)
class Layout:
    """How chunks lie in plans. Rows are chunk after chunk, each for all N plans: [K · N, H, A], as `policy.sample` has
    them for K observations and n_samples=N. Raises `InputError` for what cannot be."""

    n_chunks: int
    horizon: int
    overlap: int

    def __post_init__(self) -> None:
        if self.n_chunks < 2 or not 1 <= self.overlap < self.horizon:
            raise InputError(
                f"{self.n_chunks} chunks of {self.horizon} steps that overlap by {self.overlap}: expected 2 chunks at "
                f"least, and an overlap of 1 to {self.horizon - 1}"
            )

    @property
    def length(self) -> int:
        """L, the steps of a plan."""
        return self.n_chunks * self.horizon - (self.n_chunks - 1) * self.overlap

    @property
    def steps(self) -> Tensor:
        """Which of the plan's steps those of each chunk are, int [K, H]."""
        return torch.arange(self.n_chunks).unsqueeze(1) * (self.horizon - self.overlap) + torch.arange(self.horizon)

    def cut(self, plan: Tensor) -> Tensor:
        """Plans [N, L, A] → their chunks [K · N, H, A]."""
        return plan[:, self.steps.to(plan.device)].transpose(0, 1).flatten(0, 1)

    def join(self, chunks: Tensor) -> Tensor:
        """Chunks [K · N, H, A] → plans [N, L, A], the mean where several have a step."""
        parts = chunks.unflatten(0, (self.n_chunks, -1)).transpose(0, 1).flatten(1, 2)
        at = self.steps.flatten().to(chunks.device)
        total = chunks.new_zeros(parts.shape[0], self.length, parts.shape[2]).index_add(1, at, parts)
        return total / torch.bincount(at).to(total).unsqueeze(1)

    def gaps(self, chunks: Tensor) -> Tensor:
        """The mean distance of neighbours [K · N, H, A] where they overlap, [N]."""
        parts = chunks.unflatten(0, (self.n_chunks, -1))
        between = parts[:-1, :, -self.overlap :] - parts[1:, :, : self.overlap]
        result: Tensor = between.norm(dim=-1).mean(dim=(0, 2))
        return result


class Composition(Hook):
    """Makes the rows of a run the chunks of plans, see the file.

    ends: of the plans, [N, L, A] normalised, where `fixed`, bool [L]. rounds: how often each step's estimate is
    reconstructed; 0: plain composition. generator: draws the noise of that.
    """

    def __init__(
        self,
        layout: Layout,
        process: Process,
        ends: Tensor,
        fixed: Tensor,
        *,
        rounds: int = 0,
        generator: torch.Generator | None = None,
    ):
        if rounds < 0:
            raise InputError(f"rounds={rounds} of reconstruction: 0 or more")
        self.layout, self.process, self.rounds, self.generator = layout, process, rounds, generator
        self.ends, self.fixed = ends, fixed.unsqueeze(1)

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        expected = (self.layout.n_chunks * len(self.ends), self.layout.horizon, self.ends.shape[2])
        if x.shape != expected:
            raise InputError(f"a run of shape {list(x.shape)} for plans of {list(expected)}")
        self.last, self.judge = steps[-1], min(steps, key=lambda step: abs(step.b - JUDGED_AT))

    def wrap_denoiser(self, denoise: DenoiserCall) -> DenoiserCall:
        self.denoise = denoise
        return denoise

    def agree(self, x0: Tensor) -> Tensor:
        """Chunks [K · N, H, A] with overlaps at their mean and ends where they are to be."""
        return self.layout.cut(torch.where(self.fixed, self.ends, self.layout.join(x0)))

    def reconstructed(self, x0: Tensor, step: Step) -> Tensor:
        """D(a x0 + b z), each chunk by itself, [K · N, H, A]."""
        z = draw_noise(self.ends.shape, self.generator, x0.device, x0.dtype)
        x = step.a * x0 + step.b * self.layout.cut(z)
        return self.process.x0_from_output(self.denoise(x, step, None), x, step)

    def edit_x0(self, state: StepState) -> Tensor:
        x0 = self.agree(state.x0_hat)
        for _ in range(self.rounds):
            x0 = self.agree(self.reconstructed(x0, state.step))
        if state.step is self.last:
            self.judged = x0, self.reconstructed(x0, self.judge)
            """The finished chunks, and what they are reconstructed to."""
        return x0


@dataclass(frozen=True)
class Plans:
    """action: [B, L, A] in the data's units. error, gap: of each, [B], in the data's units: how far its chunks, made a
    little noisy, are reconstructed from where they are, and neighbours from each other where they overlap."""

    action: Tensor
    error: Tensor
    gap: Tensor


def compose(
    policy: DiffusionPolicy,
    obs: Mapping[str, Tensor],
    start: Tensor,
    goal: Tensor,
    *,
    n_chunks: int,
    overlap: int,
    n_candidates: int = 4,
    rounds: int = 4,
    restarts: Sequence[float] = RESTARTS,
    generator: torch.Generator | None = None,
) -> Plans:
    """Plans of L steps from start to goal, [B, A] each, in the data's units: their first and their last action.

    obs: key → [1, To, …] for all chunks, or [K, To, …] of each; it must not tell where a chunk is. n_candidates: plans
    made for each pair of ends, of which the one with the least error + gap is returned. rounds, restarts: 0 and () for
    plain composition. generator: all that is drawn.
    Raises `InputError` for sizes that do not fit, for ends out of what was demonstrated, and for a policy whose chunks
    are in a frame that moves with the observation: such chunks do not say where they are.
    """
    layout = Layout(n_chunks, policy.spec.horizon, overlap)
    obs = _for_each_chunk(obs, n_chunks)
    _check(policy, start, goal, n_candidates)
    with torch.no_grad():
        both = torch.stack([start, goal], dim=1).to(policy.device, torch.float32)
        pair = policy.normalize_action(both, obs).repeat_interleave(n_candidates, dim=0)
        if not (pair.abs() <= policy.sampler.reach + 1e-4).all():
            raise InputError("start or goal lies outside of what was demonstrated: the policy knows of no chunk there")
        ends = pair.new_zeros(len(pair), layout.length, pair.shape[2])
        ends[:, 0], ends[:, -1] = pair[:, 0], pair[:, 1]
        fixed = torch.zeros(layout.length, dtype=torch.bool, device=pair.device)
        fixed[[0, -1]] = True
        hook = Composition(layout, policy.process, ends, fixed, rounds=rounds, generator=generator)
        hooks: list[Hook] = [hook]
        for noise in (None, *restarts):
            if noise is not None:
                hooks = [hook, Restart(hook.judged[0], noise)]
            z = layout.cut(draw_noise(ends.shape, generator, ends.device, ends.dtype))
            policy.sample(obs, noise=z, n_samples=len(pair), generator=generator, hooks=hooks)
        chunks, reconstructed = (policy.unnormalize_action(part, obs) for part in hook.judged)
        off = (reconstructed - chunks).norm(dim=-1).unflatten(0, (n_chunks, -1))
        error, gap = (
            part.unflatten(0, (-1, n_candidates)) for part in (off.mean(dim=(0, 2)), layout.gaps(reconstructed))
        )
        best = (error + gap).argmin(dim=1)
        row = torch.arange(len(best), device=best.device)
        plans = layout.join(chunks).unflatten(0, (-1, n_candidates))
        plans[..., 0, :], plans[..., -1, :] = both[:, None, 0], both[:, None, 1]
    return Plans(plans[row, best], error[row, best], gap[row, best])


def _for_each_chunk(obs: Mapping[str, Tensor], n_chunks: int) -> dict[str, Tensor]:
    for key, value in obs.items():
        if len(value) not in (1, n_chunks):
            raise InputError(
                f"observation {key!r} of {len(value)} rows: one for all, or one for each of {n_chunks} chunks"
            )
    return {key: value.expand(n_chunks, *value.shape[1:]) for key, value in obs.items()}


def _check(policy: DiffusionPolicy, start: Tensor, goal: Tensor, n_candidates: int) -> None:
    if policy.action_frame is not None:
        raise InputError(
            "chunks in a frame that moves (policy.action_frame) cannot be composed: they say not where they are"
        )
    width = policy.spec.action.shape[0]
    if start.shape != goal.shape or start.ndim != 2 or start.shape[1] != width or not len(start):
        raise InputError(f"start {list(start.shape)} and goal {list(goal.shape)}: expected [B, {width}] for each")
    if n_candidates < 1:
        raise InputError(f"n_candidates={n_candidates} must be at least 1")
