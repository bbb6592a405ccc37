"""The policy: observation history in, action chunk out.

obs ─▶ features ─▶ normalise ─▶ encoder ─▶ condition ┐
                                      noise ─▶ denoiser × steps ─▶ unnormalise ─▶ chunk [B, H, A]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.estimator import PlanarPose
from action_diffusion.policy.frames import ActionFrame
from action_diffusion.policy.normalizer import Normalizer
from action_diffusion.policy.process import Process, Step
from action_diffusion.policy.sampler import ChainStep, Generators, Hook, Sampler, draw_noise
from action_diffusion.policy.spec import PolicySpec

IN_FRAME = "action_in_frame"
"""The normaliser's key for actions in the policy's action frame; "action" is always for those in the data's units."""
LOSSES = {
    "mse": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
    "huber": nn.functional.smooth_l1_loss,
}


@dataclass(frozen=True)
class Seen:
    """condition [B, C]; obs: the observations, and an estimated state [B, 1, n]; output: the estimator's."""

    condition: Tensor
    obs: Mapping[str, Tensor]
    output: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """Sampled chunks. action: data's units; normalized: in [−1, 1]; both [B, H, A], or [B, n, H, A] for n_samples > 1.

    chain: every transition, when asked for (rows are B · n, sample after sample of the same observation).
    """

    action: Tensor
    normalized: Tensor
    chain: list[ChainStep]


class DiffusionPolicy(nn.Module):
    """A diffusion policy made of parts (Chi et al. 2023).

    features: key → module applied to a state before normalisation. action_frame: that chunks are learnt in; None for
    the data's own. estimator: of a state that is not observed (`policy.estimator`). noise_draws: denoising examples per
    encoded observation in training, which is cheap where the encoder is the expensive part. loss_on_padding: whether
    padded steps at the ends of an episode count in the loss (they repeat the first or last action).
    """

    def __init__(
        self,
        *,
        spec: PolicySpec,
        features: Mapping[str, nn.Module],
        action_frame: ActionFrame | None = None,
        estimator: PlanarPose | None = None,
        normalizer: Normalizer,
        encoder: nn.Module,
        denoiser: Any,
        process: Process,
        sampler: Sampler,
        loss: str = "mse",
        noise_draws: int = 1,
        loss_on_padding: bool = True,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise unknown("policy.loss", loss, LOSSES)
        if noise_draws < 1:
            raise InputError(f"policy.noise_draws={noise_draws} must be at least 1")
        self.spec = spec
        self.features = nn.ModuleDict(features)
        self.action_frame = action_frame
        self.estimator = estimator
        self.normalizer = normalizer
        self.encoder = encoder
        self.denoiser = denoiser
        self.process = process
        self.sampler = sampler
        self.loss = LOSSES[loss]
        self.noise_draws = noise_draws
        self.loss_on_padding = loss_on_padding
        self.prepared: Callable[..., tuple[Tensor, Tensor]] | None = None
        """What runs in place of `plain`, see `policy.inference`."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Observation history (key → [B, To, …], data's units, images uint8) → condition [B, C]."""
        return self.see(obs, generator).condition

    def see(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Seen:
        """`encode`, and what the rest of the policy takes for the observations: an estimated state is among them."""
        ready = {
            key: self._ready(key, obs[key]) if spec.kind == "state" else obs[key]
            for key, spec in self.spec.observations.items()
        }
        embedding = self.encoder(ready, generator=generator)
        if self.estimator is None:
            return Seen(embedding, obs)
        output = self.estimator(embedding)
        key, state = self.estimator.key, self.estimator.estimate(output.detach(), obs).unsqueeze(1)
        condition = torch.cat([embedding, self._ready(key, state).flatten(1)], dim=1)
        return Seen(condition, {**obs, key: state}, output)

    def _ready(self, key: str, value: Tensor) -> Tensor:
        """A state [B, To, …] as the encoder takes it."""
        value = value.float().flatten(2)
        if key in self.features:
            value = self.features[key](value)
        return self.normalizer.normalize(key, value)

    def normalize_action(self, action: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """Chunks [B · n, H, A] in the data's units → what the denoiser works on; rows of an observation are neighbours.

        obs: key → [B, To, …], of `see` where a state is estimated; a frame moves with it, so a running chunk has other
        normalised values at every step.
        """
        if self.action_frame is None:
            return self.normalizer.normalize("action", action)
        return self.normalizer.normalize(IN_FRAME, self.action_frame.enter(action, self._now(obs, len(action))))

    def unnormalize_action(self, normalized: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `normalize_action`."""
        if self.action_frame is None:
            return self.normalizer.unnormalize("action", normalized)
        in_frame = self.normalizer.unnormalize(IN_FRAME, normalized)
        return self.action_frame.leave(in_frame, self._now(obs, len(normalized)))

    def _now(self, obs: Mapping[str, Tensor], rows: int) -> Tensor:
        assert self.action_frame is not None
        now = obs[self.action_frame.observation][:, -1].float().flatten(1)
        return now.repeat_interleave(rows // len(now), dim=0)

    def forward(
        self,
        obs: Mapping[str, Tensor],
        action: Tensor,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The training loss, a scalar. action [B, H, A] in the data's units; mask [B, H], False where padded.

        `generator` draws crops, times and noise: the loss is a function of the weights, the batch and its state.
        With an estimator, `obs` holds the recorded state as well, and its loss is added.
        """
        seen = self.see(obs, generator)
        loss = self._denoising_loss(seen, action, mask, generator)
        if self.estimator is not None and seen.output is not None:
            loss = loss + self.estimator.loss(seen.output, obs[self.estimator.key][:, -1].float())
        return loss

    def _denoising_loss(
        self, seen: Seen, action: Tensor, mask: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        condition = seen.condition
        x0 = self.normalize_action(action, seen.obs)
        if self.noise_draws > 1:
            condition = condition.repeat(self.noise_draws, 1)
            x0 = x0.repeat(self.noise_draws, 1, 1)
        times = self.process.draw_times(len(x0), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        film = self.denoiser.prepare(condition, times)
        output = self.denoiser(self.process.add_noise(x0, eps, times), film.steps + film.condition)
        target = self.process.target(x0, eps, times)
        if self.loss_on_padding or mask is None:
            return self.loss(output, target)
        weight = mask.repeat(self.noise_draws, 1).unsqueeze(-1).expand_as(target)
        return (self.loss(output, target, reduction="none") * weight).sum() / weight.sum()

    def sample(
        self,
        obs: Mapping[str, Tensor],
        *,
        noise: Tensor | None = None,
        n_samples: int = 1,
        noise_generator: Generators = None,
        generator: Generators = None,
        hooks: Sequence[Hook] = (),
        grad: bool = False,
        return_chain: bool = False,
    ) -> Sample:
        """Sample chunks for observations (key → [B, To, …], data's units, on the policy's device).

        The encoder runs once per observation; its embedding is repeated for `n_samples`. noise [B · n, H, A] is the
        initial noise; without it `noise_generator` draws it, and `generator` draws the noise of stochastic steps
        (each one, or a list with one per row, so that a row does not depend on its neighbours). `hooks`: see
        `sampler.Hook`. grad=True lets gradients flow from the chunk to weights, noise and observations; otherwise
        only what a hook needs is differentiated.
        """
        rows, device = n_samples * len(next(iter(obs.values()))), self.device
        shape = (rows, self.spec.horizon, *self.spec.action.shape)
        if noise is None:
            noise = draw_noise(shape, noise_generator, device, torch.float32)
        elif noise.shape != shape:
            raise InputError(f"noise has shape {list(noise.shape)}, expected {list(shape)}")
        drawn = self.sampler.draw_step_noise(noise, generator)
        chain: list[ChainStep] = []
        if self._replays and n_samples == 1 and not (hooks or grad or return_chain or torch.is_grad_enabled()):
            assert self.prepared is not None
            values = [obs[key] for key in self.spec.observations]
            action, normalized = self.prepared(noise, *([] if drawn is None else [drawn]), *values)
        else:
            options: dict[str, Any] = {"hooks": hooks, "grad": grad, "return_chain": return_chain}
            action, normalized, chain = self._sample(obs, noise, drawn, n_samples, **options)
        if n_samples > 1:
            normalized, action = (t.unflatten(0, (-1, n_samples)) for t in (normalized, action))
        return Sample(action, normalized, chain)

    def _sample(
        self, obs: Mapping[str, Tensor], noise: Tensor, drawn: Tensor | None, n_samples: int = 1, **options: Any
    ) -> tuple[Tensor, Tensor, list[ChainStep]]:
        """Chunks [B · n, H, A] in the data's units and normalised, and the chain; all noise is given."""
        with torch.set_grad_enabled(options["grad"]):
            seen = self.see(obs)
            condition = seen.condition.repeat_interleave(n_samples, dim=0) if n_samples > 1 else seen.condition
            film = self.denoiser.prepare(condition, self.sampler.times(condition.device))

        def denoise(x: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
            return self.denoiser(x, film.at(step.index, rows))

        normalized, chain = self.sampler.run(denoise, noise, step_noise=drawn, **options)
        return self.unnormalize_action(normalized, seen.obs), normalized, chain

    def plain(self, noise: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks [B, H, A] in the data's units and normalised, as a function of nothing but tensors, without gradients.

        given: the noise of steps that draw some (`Sampler.draw_step_noise`), if any do; then observations, in order.
        """
        drawn = given[0] if len(given) > len(self.spec.observations) else None
        obs = dict(zip(self.spec.observations, given[0 if drawn is None else 1 :], strict=True))
        action, normalized, _ = self._sample(obs, noise, drawn, grad=False)
        return action, normalized

    @property
    def _replays(self) -> bool:
        """Whether `prepared` still stands for these weights: the denoiser forgets what was prepared for others."""
        return self.prepared is not None and self.denoiser.prepared is not None

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise: np.ndarray | None = None,
        noise_generator: Generators = None,
        generator: Generators = None,
        hooks: Sequence[Hook] = (),
    ) -> dict[str, np.ndarray]:
        """Actions for a dictionary of numpy arrays, [To, …] or [B, To, …] each, in the data's own units.

        Returns float32 `action` [(B,) Ta, A], the steps to execute, and `action_pred` [(B,) H, A], the whole chunk.
        Raises `InputError` for observations that differ from `spec`.
        """
        batched = self.spec.check(obs)
        tensors = {}
        for key in self.spec.observations:
            value = np.ascontiguousarray(obs[key] if batched else np.asarray(obs[key])[None])
            tensors[key] = torch.from_numpy(value).to(self.device)
        start = None if noise is None else torch.from_numpy(np.asarray(noise, np.float32)).to(self.device)
        # Nothing here is differentiated later, which inference mode makes use of: a tenth of a small network's step.
        quick = not any(hook.needs_gradient for hook in hooks)
        with torch.inference_mode() if quick else torch.no_grad():
            sample = self.sample(
                tensors, noise=start, noise_generator=noise_generator, generator=generator, hooks=hooks
            )
        chunk = sample.action.float().cpu().numpy()
        now = self.spec.n_obs_steps - 1
        action = chunk[:, now : now + self.spec.n_action_steps]
        return {"action": action if batched else action[0], "action_pred": chunk if batched else chunk[0]}
