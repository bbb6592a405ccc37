"""What is measured while training: held-out loss and action error, and short rollouts. The caller puts the EMA in."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from action_diffusion import envs
from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.envs.rollout import rollout
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.text.words import Words
from action_diffusion.training.data import held_out_indices

ROLLOUT_SEED = 50_000
"""First start of the rollouts in training: neither the demonstrations' (from 0) nor the evaluation's (from 100000)."""


BATCH = 10
"""Rows of every policy call of these rollouts."""


class Validation:
    """`validation_loss`, and `action_error`: mean absolute error of sampled actions over the executed steps.

    The error is in the data's units, averaged over action dimensions; the same windows, times and noise each time.
    parts: name → its windows, int64 [n], and its share of what is drawn. Then each part is measured by itself, as
    `validation_loss/NAME`, and the two numbers are their means by these shares.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        source: BatchSource,
        *,
        count: int = 256,
        batch_size: int = 64,
        parts: Mapping[str, tuple[np.ndarray, float]] | None = None,
    ):
        self.policy, self.source = policy, source
        self.parts = dict(parts or {})
        windows = [own for own, _ in self.parts.values()] or [np.arange(len(source))]
        each = max(1, count // len(windows))
        self.indices = [own[held_out_indices(own, each)] for own in windows]
        self.batch_size = batch_size

    def __call__(self) -> dict[str, float]:
        measured = [self._measure(indices) for indices in self.indices]
        if not self.parts:
            return measured[0]
        shares = [share for _, share in self.parts.values()]
        whole = {key: float(np.average([one[key] for one in measured], weights=shares)) for key in measured[0]}
        each = zip(self.parts, measured, strict=True)
        return whole | {f"{key}/{name}": value for name, one in each for key, value in one.items()}

    @torch.no_grad()
    def _measure(self, windows: np.ndarray) -> dict[str, float]:
        spec, device = self.policy.spec, self.policy.device
        executed = slice(spec.n_obs_steps - 1, spec.n_obs_steps - 1 + spec.n_action_steps)
        generator = torch.Generator(device).manual_seed(0)
        losses, errors = [], []
        for indices in np.array_split(windows, max(1, len(windows) // self.batch_size)):
            batch = self.source.gather(indices)
            losses.append(self.policy(batch.obs, batch.action, batch.mask, generator=generator, **batch.beside))
            chunk = self.policy.sample(batch.obs, noise_generator=generator, generator=generator).action
            error = (chunk - batch.action)[:, executed].abs().mean(-1)
            errors.append(error[batch.mask[:, executed]].mean())
        return {
            "validation_loss": float(torch.stack(losses).mean()),
            "action_error": float(torch.stack(errors).mean()),
        }


class Rollouts:
    """`rollout_score`: mean score of a few episodes from starts that neither training nor evaluation uses.

    words: that the policy is told. workers: where the simulators run, see `envs.spread`.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        env: Mapping[str, Any],
        n_episodes: int,
        words: Words | None = None,
        workers: envs.Workers = None,
    ) -> None:
        self.policy, self.env, self.n_episodes = policy, dict(env), n_episodes
        self.words, self.workers = words, workers

    def __call__(self) -> dict[str, float]:
        n_envs, workers = envs.spread(self.env["name"], None, self.workers, batch=BATCH)
        episodes = rollout(
            policy=self.policy,
            make_env=functools.partial(envs.make, **self.env, words=self.words),
            seeds=range(ROLLOUT_SEED, ROLLOUT_SEED + self.n_episodes),
            keys=list(self.policy.spec.observations),
            n_envs=n_envs,
            policy_batch=BATCH,
            workers=workers,
        )
        return {"rollout_score": float(np.mean([episode.score for episode in episodes]))}
