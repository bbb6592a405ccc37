"""Shared control: a person owns some values of the action, the policy fills in the others (HITL-D).

    person ── own(owned, values) ─▶ SharedControl ── hook, finish ─▶ chunks whose owned values are the person's,
                                                                     and whose others go with them

Two ways of which the second holds the first:

    set      x̂0 ← S(x̂0) in every denoising step. S puts the person's values, in the data's units, in the place of the
             owned ones. The noise that a scheduler then derives, (x − a S(x̂0)) / b, is what the sample had in the owned
             values all along: they are the person's, noised as far as the step is (inpainting).
    guided   before that, x̂0 ← x̂0 + g ⟨r, g⟩ / ⟨g, g⟩ with r = S(x̂0) − x̂0 and g = VJP_x[r], up to `rounds` times
             (`rtc.fitted`): the others are moved as they go together with the owned ones.

The difference is when the others hear of it. Set alone, they are told by a sample that is mostly noise at first, and by
the time that it is not they have often decided (a network that sees two ways keeps to the other one). The product with
the Jacobian, the covariance given x up to a factor, tells them in the first step.

What a person does next nobody knows: `extrapolated` goes on from what they do now, and `fading` lets that count less
and less, s_i = max(0, 1 − i / fading) in step i from now on: S(x̂0) = s · person + (1 − s) · x̂0 in the owned values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import Hook, StepState
from action_diffusion.policy.model.denoiser import Film
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.rtc import fitted
from action_diffusion.policy.sample import Encoded


class SharedControl:
    """See above and `sample.Acting`. While a person owns something it is the first of the policy's extensions, so that
    limits which act as well hold for the person's values too; else it is none of them, and costs nothing.

    Args:
        rounds: products with the Jacobian in a denoising step at most; 0: set alone, which needs no gradients.
        fading: steps from now on after which the person's values no longer count; None: they always count whole.
    """

    def __init__(self, policy: DiffusionPolicy, *, rounds: int = 2, fading: int | None = None) -> None:
        if rounds < 0:
            raise InputError(f"shared control: rounds={rounds} must be 0 or more")
        if fading is not None and fading < 1:
            raise InputError(f"shared control: fading={fading} must be at least 1 step")
        self.policy, self.rounds, self.fading = policy, rounds, fading
        self._owned, self._values = torch.zeros(0, dtype=torch.bool), torch.zeros(0)

        self.needs_gradient = rounds > 0

    def own(self, owned: np.ndarray | None, values: np.ndarray | None = None) -> None:
        """From the next chunk on.

        owned: which values of an action are the person's, bool [A], or [B, A], a row for each chunk; None, or none: the
        policy's all. values: what they are, [L, A] or [B, L, A] in the data's units, from now on, L >= 1; the last goes
        on where L is less than a chunk has. What is not owned is not looked at.
        Raises `InputError` for other shapes, for what is not finite, and for a part of a rotation.
        """
        others = [acting for acting in self.policy.extensions if acting is not self]
        if owned is None or not np.any(owned):
            self.policy.extensions = others
            return
        spec = self.policy.spec
        mine, given = np.asarray(owned, bool), np.asarray([] if values is None else values, np.float32)
        mine, given = (part if part.ndim == n else part[None] for part, n in ((mine, 2), (given, 3)))
        n_action = spec.action.shape[0]
        if mine.shape[1:] != (n_action,) or given.ndim != 3 or given.shape[2] != n_action or not given.shape[1]:
            shapes = f"owned {list(np.shape(owned))}, values {list(given.shape[-2:])}"
            raise InputError(f"shared control: {shapes}, expected [{n_action}] and [L, {n_action}]")
        for rotation in spec.action.rotations:
            if (mine[:, rotation.columns].any(1) != mine[:, rotation.columns].all(1)).any():
                raise InputError(f"shared control: a {rotation.representation} is owned as a whole, or not at all")
        given = np.where(mine[:, None], given, 0.0)
        if not np.isfinite(given).all():
            raise InputError("shared control: the person's values hold NaN or infinity")
        length = spec.horizon - (spec.n_obs_steps - 1)
        last = np.repeat(given[:, -1:], max(0, length - given.shape[1]), axis=1)
        given = np.concatenate([given[:, :length], last], axis=1)
        self.policy.extensions = [self, *others]
        self._owned = torch.from_numpy(mine).to(self.policy.device)
        self._values = torch.from_numpy(given.astype(np.float32)).to(self.policy.device)

    def modulate(self, seen: Encoded, film: Film) -> Film:
        return film

    def hooks(self, seen: Encoded) -> Sequence[Hook]:
        return [_Inpaint(self, seen)]

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.put(seen, normalized), {}

    def put(self, seen: Encoded, normalized: Tensor) -> Tensor:
        """S: chunks [B, H, A], normalised, with the person's values in the place of the owned ones."""
        action, now = self.policy.unnormalize_action(normalized, seen.obs), self.policy.spec.n_obs_steps - 1
        share = torch.ones(action.shape[1] - now, device=action.device)
        if self.fading is not None:
            share = (1 - torch.arange(len(share), device=action.device) / self.fading).clamp_min(0.0)
        share = share[:, None] * self._owned.unsqueeze(1)
        coming = torch.lerp(action[:, now:], self._values, share.expand_as(action[:, now:]))
        return self.policy.normalize_action(torch.cat([action[:, :now], coming], dim=1), seen.obs)


class _Inpaint(Hook):
    def __init__(self, shared: SharedControl, seen: Encoded) -> None:
        self._shared, self._seen = shared, seen
        self.needs_gradient = shared.needs_gradient

    def edit_x0(self, state: StepState) -> Tensor:
        estimate = state.x0_hat if torch.is_grad_enabled() else state.x0_hat.detach()
        if self.needs_gradient:
            estimate = estimate + fitted(state, lambda by: self._residual(estimate + by), self._shared.rounds)
        return self._shared.put(self._seen, estimate)

    def _residual(self, x0: Tensor) -> Tensor:
        return self._shared.put(self._seen, x0) - x0


def extrapolated(recent: np.ndarray, steps: int, *, velocity: bool = False) -> np.ndarray:
    """What a person does in the next `steps` control steps, [steps, A], the first of them now: what they did last.

    recent: their last commands, [K, A], K >= 1, the last of them now. velocity: go on at the mean velocity of these.
    """
    rate = (recent[-1] - recent[0]) / max(1, len(recent) - 1) if velocity else np.zeros_like(recent[-1])
    result: np.ndarray = recent[-1] + np.arange(steps)[:, None] * rate
    return result
