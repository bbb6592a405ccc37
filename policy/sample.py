"""What goes into a chunk and what comes out of it, and what may act in between.

obs ─▶ Encoded ─▶ noise ──denoising steps, Prefix kept──▶ normalised chunks ─▶ one of them ─▶ Sample
          │         ▲ start     ▲ modulate, hooks                ▲ finish        ▲ choose
          └─────────┴───────────┴──── Acting ────────────────────┴───────────────┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from action_diffusion.policy.diffusion.sampler import ChainStep, Hook
from action_diffusion.policy.model.denoisers.denoiser import Film
from action_diffusion.policy.objectives.objective import Network


@dataclass(frozen=True)
class Encoded:
    """condition [B, C]; obs: the observations, and an estimated state [B, 1, n]; output: the estimator's.

    episodes: of each of the B rows a number that is the same in all chunks of an episode, and another in others: the
    seed of what draws its noise; None where nobody says.
    """

    condition: Tensor
    obs: Mapping[str, Tensor]
    output: Tensor | None = None
    episodes: Sequence[int] | None = None


@dataclass(frozen=True)
class Prefix:
    """What of a chunk is known before it is predicted: action [B, H, A], normalised, at steps, bool [B, H]."""

    action: Tensor
    steps: Tensor

    @classmethod
    def none(cls, x: Tensor) -> Prefix:
        """No step of chunks like x [B, H, A]."""
        return cls(torch.zeros_like(x), x.new_zeros(x.shape[:2], dtype=torch.bool))

    def mark(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [R, H, A] for a denoiser that is `marked`: prefix steps clean, and a channel that says which these are."""
        action, steps = self.action, self.steps.unsqueeze(-1)
        if rows is not None:
            action, steps = action[rows], steps[rows]
        return torch.cat([torch.where(steps, action, x), steps.to(x.dtype)], dim=-1)


@dataclass(frozen=True)
class Sample:
    """Sampled chunks. action: data's units; normalized: in [−1, 1]; both [B, H, A], or [B, n, H, A] for n_samples > 1.

    chain: every transition, when asked for (rows are B · n, sample after sample of the same observation). notes: what
    extensions say of each chunk, "guard.score" → [B · n].
    """

    action: Tensor
    normalized: Tensor
    chain: list[ChainStep]
    notes: Mapping[str, Tensor] = field(default_factory=dict)


class Acting:
    """What acts while a chunk is made, see `policy.extensions`. B: rows, each a chunk; `seen` has their conditions.

    What a class does not override does nothing. Of those that act together one may choose among several chunks.
    """

    needs_gradient: bool = False
    """Whether one of its hooks does (`Hook.needs_gradient`)."""
    noises: int = 1
    """How many initial noises it wants to see for each chunk."""
    candidates: int = 1
    """How many chunks it wants to choose from; the noises that `start` returns."""

    def start(self, seen: Encoded, noise: Tensor) -> Tensor:
        """The initial noise [B, candidates, H, A] to go on with, of what was drawn, [B, noises, H, A]."""
        return noise

    def modulate(self, seen: Encoded, film: Film) -> Film:
        """What the denoiser is told of the steps and of the observations, to go on with."""
        return film

    def hooks(self, seen: Encoded) -> Sequence[Hook]:
        """Hooks of one sampling run, made anew for each."""
        return ()

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The chunks [B, H, A], normalised, to go on with, and what there is to say of each: name → [B]."""
        return normalized, {}

    def choose(self, seen: Encoded, normalized: Tensor) -> Tensor:
        """Which of its candidates [B, candidates, H, A] each chunk is, int64 [B]."""
        return torch.zeros(len(normalized), dtype=torch.long, device=normalized.device)


def network_of(denoiser: Any, condition: Tensor, prefix: Prefix | None) -> Network:
    """A denoiser with the conditions [B, C] of the examples, as objectives call it."""

    def network(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        film = denoiser.prepare(condition if rows is None else condition[rows], times)
        result: Tensor = denoiser(x if prefix is None else prefix.mark(x, rows), film.steps + film.condition)
        return result

    return network
