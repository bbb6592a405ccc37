"""The row `guard`: unusual observations and chunks are told apart, and a deployment that goes wrong is flagged."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from action_diffusion.datasets.batches.loader import Batch
from action_diffusion.envs.pusht.simulator import PushT
from action_diffusion.envs.rollout import Episode, rollout
from action_diffusion.options.configuration import settings_of
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.extensions.guard import Guard
from action_diffusion.policy.extensions.watch import Watch
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.training.fitting import demonstrations, fit
from benchmarks.rows import policies
from benchmarks.rows.system import Measured, System

STARTS, GONE_AT = 50, 48
AWAY = 20.0
"""Pixels from every demonstrated place of the block."""
ENDED = 1.0


class BlockGone(PushT):
    """PushT in which, after `GONE_AT` steps of every other start, somebody takes the block off the table."""

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._start = seed

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        if self._steps == GONE_AT and self._start % 2:
            random, steps = np.random.default_rng(self._start), self._steps
            finger = self.observe(["agent_pos"])["agent_pos"]
            self.restore(np.array([*finger, *random.uniform([560, 0], [660, 512]), random.uniform(0, 2 * np.pi)]))
            self._steps = steps
        return super().step(action)


class Listening:
    """A policy, with what its guard noted of every call: name → [calls, B]."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self._policy, self._calls = policy, list[Mapping[str, np.ndarray]]()
        self.spec: PolicySpec = policy.spec

    def predict(self, obs: Mapping[str, np.ndarray], **noises: Any) -> Mapping[str, np.ndarray]:
        self._calls.append(self._policy.predict(obs, **noises))
        return self._calls[-1]

    def notes(self, name: str) -> np.ndarray:
        return np.stack([call[name] for call in self._calls])


def measure(seed: int) -> Measured:
    """See `System`."""
    bundle = policies.pusht(seed)
    config = settings_of("fit guard", [f"bundle={bundle}", "device=cpu"])
    fit("guard", config)
    policy = bundles.load(bundle, extensions=["guard"], precision="fp32")
    guard = policy.extensions[0]
    assert isinstance(guard, Guard)
    guard.notes_chunks = True  # to be held against
    train, held_out, _ = demonstrations(policy, Path(bundle), config)
    random = np.random.default_rng(seed)
    batch = held_out.gather(random.choice(len(held_out), min(1000, len(held_out)), replace=False))
    places = untouched(train.values("state")[:, 2:4], random)
    chunk, observation, own = separated(guard, batch, places, random)
    flagged, alone = deployed(policy, seed)
    guard.notes_chunks = False
    separate = {"AUROC of chunks": chunk, "AUROC of observations": observation}
    measured = {**separate, **flagged, "denoising steps": cost(policy)}
    passed = (
        chunk >= 0.95
        and observation >= 0.9
        and flagged["failures flagged"] >= 0.7
        and flagged["successes flagged"] <= 0.1
        and measured["denoising steps"] <= 1.0
    )
    beside = {"AUROC of observations by chunks": own, **{f"{name} by chunks": value for name, value in alone.items()}}
    return Measured(measured, beside, passed)


def untouched(places: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Places of the block on the table, [n, 2] px, that are `AWAY` from all that were demonstrated, `places` [N, 2]."""
    drawn = random.uniform(40, 472, (4000, 2)).astype(np.float32)
    near = torch.cdist(torch.from_numpy(drawn), torch.from_numpy(places[::2])).amin(dim=1).numpy()
    return drawn[near > AWAY]


def separated(
    guard: Guard, batch: Batch, places: np.ndarray, random: np.random.Generator
) -> tuple[float, float, float]:
    """AUROC of shuffled chunks, of observations with the block at `places`, and of these by the policy's error."""
    policy = guard.policy
    moved = {key: value.clone() for key, value in batch.obs.items()}
    there = torch.from_numpy(places[random.integers(len(places), size=len(batch.mask))])
    moved["state"][..., 2:4] = there[:, None]
    with torch.inference_mode():
        seen, strange = policy.see(batch.obs), policy.see(moved)

        def of_chunks(action: torch.Tensor) -> np.ndarray:
            return guard.chunk_score(seen.condition, policy.normalize_action(action, seen.obs)).numpy()

        chunks = of_chunks(batch.action), of_chunks(batch.action.roll(1, dims=0))
        observations = [guard.observation_score(one.condition).numpy() for one in (seen, strange)]
        made = [policy.sample(obs, noise_generator=torch.Generator().manual_seed(0)) for obs in (batch.obs, moved)]
        own = [sample.notes["guard.chunk"].numpy() for sample in made]
    return auroc(*chunks), auroc(*observations), auroc(*own)


def auroc(usual: np.ndarray, unusual: np.ndarray) -> float:
    """The probability that one of `unusual` [m] scores above one of `usual` [n]."""
    below = np.searchsorted(np.sort(usual), unusual, side="left")
    upto = np.searchsorted(np.sort(usual), unusual, side="right")
    return float((below + upto).mean() / 2 / len(usual))


def deployed(policy: DiffusionPolicy, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of failed and of successful episodes that are flagged before they end, by the guard; and by a guard of the
    policy's own chunks alone, whose threshold is 1."""
    assert policy.spec.env is not None
    settings = {key: value for key, value in policy.spec.env.items() if key != "name"}
    rows, episodes, levels, chunks = STARTS // 2, list[Episode](), list[np.ndarray](), list[np.ndarray]()
    for first in (10_000 * (seed + 1), 10_000 * (seed + 1) + rows):
        listening = Listening(policy)
        episodes += rollout(
            policy=listening,
            make_env=functools.partial(BlockGone, **settings),
            seeds=range(first, first + rows),
            keys=list(policy.spec.observations),
            n_envs=rows,
            policy_batch=rows,
        )
        order = [start % rows for start in range(first, first + rows)]
        levels += list(listening.notes("guard.level").T[order])
        chunks += list(listening.notes("guard.chunk").T[order] - 1)
    failed = np.array([episode.score < ENDED for episode in episodes])
    return flags(policy, episodes, failed, levels), flags(policy, episodes, failed, chunks)


def flags(
    policy: DiffusionPolicy, episodes: Sequence[Episode], failed: np.ndarray, levels: Sequence[np.ndarray]
) -> dict[str, float]:
    flagged = []
    for episode, level in zip(episodes, levels, strict=True):
        watch = Watch()
        count = -(-episode.n_steps // policy.spec.n_action_steps)
        flagged.append(any([watch.take(float(value)) for value in level[:count]]))
    hit = np.array(flagged)
    return {
        "failures": float(failed.sum()),
        "failures flagged": float(hit[failed].mean()),
        "successes flagged": float(hit[~failed].mean()),
    }


def cost(policy: DiffusionPolicy, rounds: int = 60) -> float:
    """CPU time of the guard in a chunk of one row, over that of a denoising step: a share of the sampler's loop."""
    spec, guard = policy.spec, policy.extensions[0]
    obs = {key: torch.zeros(1, spec.n_obs_steps, *value.shape) for key, value in spec.observations.items()}
    chunk = torch.zeros(1, spec.horizon, *spec.action.shape)
    seconds: dict[str, list[float]] = {"guard": [], "loop": []}
    with torch.inference_mode():
        seen = policy.see(obs)
        film = policy.denoiser.prepare(seen.condition, policy.sampler.times(policy.device))

        def denoise(x: torch.Tensor, step: Step, rows: torch.Tensor | None = None) -> torch.Tensor:
            result: torch.Tensor = policy.denoiser(x, film.at(step.index, rows))
            return result

        works: dict[str, Callable[[], object]] = {
            "guard": lambda: guard.finish(seen, chunk),
            "loop": lambda: policy.sampler.run(denoise, chunk),
        }
        for _ in range(rounds):
            for name, work in works.items():
                began = time.process_time()
                work()
                seconds[name].append(time.process_time() - began)
    step = np.median(seconds["loop"]) / len(policy.sampler.steps)
    return float(np.median(seconds["guard"]) / step)


SYSTEM = System(
    name="guard",
    what="Unusual observations and chunks score above demonstrated ones, and episodes that fail are flagged in time.",
    bar=(
        "AUROC >= 0.95 (shuffled chunks), >= 0.9 (block where none was); failures flagged >= 70 %, successes <= 10 %; "
        "<= 1 denoising step"
    ),
    measure=measure,
)
