"""Choosing among chunks by the futures that a latent diffusion model imagines after each.

                       chunk 1 ─▶ imagination ─▶ embeddings to come ─▶ score 1 ┐
    obs ─▶ encoder ─▶ embedding     …                                          ├─▶ the chunk with the best score
                       chunk n ─▶ imagination ─▶ embeddings to come ─▶ score n ┘

The imagination is a diffusion model of p(e_1 … e_T, v_1 … v_T | e_0, chunk): what the policy's own encoder will say at
T instants after the chunk has begun, and what these are worth, as the data label them. It works on embeddings, never on
pixels (the idea of JEDI, a world model of joint embeddings by diffusion; decided here: the value is imagined along with
the embedding, instead of by a network of its own). It is a `DiffusionPolicy` itself, whose observations are embedding
and chunk, and whose "chunk" is the future [T, C + 1]: the same network, process and sampler.

Chunks are scored by the mean value of m futures, from noise that all candidates of an observation share, so that these
differ by what they do and not by luck:

    score(chunk) = mean over m futures of  mean over t of v_t          choice = argmax over the n candidates

or by any function of the imagined embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.diffusion.sampler import draw_noise
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

Score = Callable[[Tensor, Tensor], Tensor]
"""Imagined embeddings [N, T, C] and values [N, T] → how good each future is, [N]."""

NETWORK: dict[str, Any] = {
    "encoder": {"name": "observation"},
    "denoiser": {"name": "unet1d", "channels": [32, 64], "n_groups": 4, "kernel_size": 3},
    "process": {"name": "diffusion", "prediction": "sample"},
    "sampler": {"scheduler": "ddim", "num_inference_steps": 10},
    "objective": {"name": "denoising"},
    "normalizer": {"default": "minmax"},
}
"""The `policy` section that an imagination is built from."""


def mean_value(embeddings: Tensor, values: Tensor) -> Tensor:
    """The score of the file's equation, [N]."""
    return values.mean(dim=1)


def describe(embedding: np.ndarray, chunk: np.ndarray, future: np.ndarray) -> PolicySpec:
    """The specification of an imagination for training arrays, see `Imagination.fit`."""
    parts = {
        "embedding": embedding,
        "chunk": chunk.reshape(len(chunk), -1),
        "action": future.reshape(-1, future.shape[2]),
    }
    return PolicySpec(
        observations={
            key: ObservationSpec(shape=(parts[key].shape[1],), kind="state", source=key)
            for key in ("embedding", "chunk")
        },
        action=ActionSpec(shape=(future.shape[2],), source="future"),
        n_obs_steps=1,
        horizon=future.shape[1],
        n_action_steps=1,
        control_rate=1.0,
        task="imagination",
        normalizer={key: normalizer.fit(value, "minmax") for key, value in parts.items()},
    )


@dataclass(frozen=True)
class Imagination:
    """model: of the future, see the file; rows that it is asked for do not know each other."""

    model: DiffusionPolicy

    @classmethod
    def fit(
        cls,
        embedding: np.ndarray,
        chunk: np.ndarray,
        future: np.ndarray,
        value: np.ndarray,
        *,
        steps: int = 2000,
        batch_size: int = 256,
        lr: float = 1e-3,
        seed: int = 0,
        network: Mapping[str, Any] | None = None,
    ) -> Imagination:
        """Learn what follows: embedding [N, C] (`DiffusionPolicy.encode`) and chunk [N, H, A] in the data's units →
        future [N, T, C] and value [N, T] (any numbers; more is better). T must suit the denoiser (here: be even).
        network: sections of `policy`, instead of those of `NETWORK`.

        Raises `InputError` for arrays that do not fit each other, and for NaN or infinity in them.
        """
        arrays = {"embedding": embedding, "chunk": chunk, "future": future, "value": value}
        n, t, c = future.shape if future.ndim == 3 else (0, 0, 0)
        if embedding.shape != (n, c) or value.shape != (n, t) or chunk.ndim != 3 or len(chunk) != n or n == 0:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise InputError(f"{shapes}: expected [N, C], [N, H, A], [N, T, C] and [N, T]")
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise InputError(f"{name} holds NaN or infinity")
        target = np.concatenate([future, value[:, :, None]], axis=2).astype(np.float32)
        torch.manual_seed(seed)
        model = build_policy(NETWORK | dict(network or {}), describe(embedding, chunk, target))
        tensors = [torch.as_tensor(array, dtype=torch.float32) for array in (embedding[:, None], chunk, target)]
        tensors[1] = tensors[1].flatten(1).unsqueeze(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-6)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(n, (batch_size,), generator=generator)
            now, done, then = (tensor[rows] for tensor in tensors)
            loss = model({"embedding": now, "chunk": done}, then, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return cls(model.eval().requires_grad_(False))

    def imagine(self, embedding: Tensor, chunk: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [N, T, C] and values [N, T] after chunks [N, H, A] at embeddings [N, C], one future each.

        noise [N, T, C + 1]: the initial noise of each.
        """
        obs = {"embedding": embedding.unsqueeze(1), "chunk": chunk.flatten(1).unsqueeze(1)}
        future = self.model.sample(obs, noise=noise).action
        return future[:, :, :-1], future[:, :, -1]


@dataclass(frozen=True)
class Chosen:
    """action: the chosen chunk of each observation [B, H, A], data's units. scores, candidates: of all, [B, n] and
    [B, n, H, A]."""

    action: Tensor
    scores: Tensor
    candidates: Tensor


def choose(
    policy: DiffusionPolicy,
    obs: Mapping[str, Tensor],
    imagination: Imagination,
    *,
    n_samples: int = 16,
    n_futures: int = 4,
    score: Score = mean_value,
    generator: torch.Generator | None = None,
) -> Chosen:
    """Chunks for observations (key → [B, To, …], data's units), each the best of n_samples by `score`, see the file.

    generator: all that is drawn. Raises `InputError` for an imagination that is not for this policy.
    """
    if n_samples < 2 or n_futures < 1:
        raise InputError(f"n_samples={n_samples}, n_futures={n_futures}: expected at least 2, and at least 1")
    with torch.no_grad():
        embedding = policy.encode(obs)
        _check(imagination.model.spec, policy.spec, embedding.shape[1])
        shape = (n_samples * len(embedding), *policy.spec.noise_shape)
        start = draw_noise(shape, generator, policy.device, torch.float32)
        candidates = policy.sample(obs, noise=start, n_samples=n_samples, generator=generator).action
        spec = imagination.model.spec
        drawn = (len(embedding), 1, n_futures, spec.horizon, *spec.action.shape)
        noise = draw_noise(drawn, generator, policy.device, torch.float32).expand(-1, n_samples, *[-1] * 3)
        now = embedding[:, None, None].expand(-1, n_samples, n_futures, -1)
        chunks = candidates.unsqueeze(2).expand(-1, -1, n_futures, -1, -1)
        imagined = imagination.imagine(now.flatten(0, 2), chunks.flatten(0, 2), noise=noise.flatten(0, 2))
        scores = score(*imagined).view(len(embedding), n_samples, n_futures).mean(dim=2)
        best = candidates[torch.arange(len(scores)), scores.argmax(dim=1)]
    return Chosen(best, scores, candidates)


def _check(imagines: PolicySpec, policy: PolicySpec, width: int) -> None:
    takes = [imagines.observations[key].shape[0] for key in ("embedding", "chunk")]
    gives = [width, policy.horizon * math.prod(policy.action.shape)]
    if takes != gives:
        raise InputError(
            f"the imagination is for embeddings and chunks of {takes[0]} and {takes[1]} numbers, the policy has "
            f"{gives[0]} and {gives[1]}"
        )
