"""A scripted person who steers one axis of PushT's finger, late and shakily, while the policy steers the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from action_diffusion.envs.pusht.expert import PushTExpert
from action_diffusion.envs.pusht.simulator import PushT
from action_diffusion.envs.rollout import generators
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.shared import SharedControl, extrapolated
from action_diffusion.policy.history import History
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.rows.policies import pusht, trained
from benchmarks.rows.system import Measured, System

STARTS, STEPS = 20, 300
EVERY = 1
"""Control steps from one chunk to the next: what a person does now, the policy's values have to follow now."""
DELAY, TREMBLE, KEEPS = 1, 20.0, 0.8
"""The person acts on what was DELAY control steps ago; their hand is TREMBLE px off (sd), KEEPS of it from the last."""
AXIS = np.array([True, False])
"""Of the person: x."""
ROUNDS, FADING = 2, 1
"""The person's hand shakes, so that what it does now says little of what it does next."""


class ShakyPerson:
    """The scripted expert of PushT, late and shaky."""

    def __init__(self, seed: int) -> None:
        self._expert, self._random = PushTExpert(seed=seed), np.random.default_rng([seed, 1])
        self._expert.reset()
        self._seen: deque[np.ndarray] = deque(maxlen=DELAY + 1)
        self._off = np.zeros(2)
        self.recent: deque[np.ndarray] = deque(maxlen=3)

    def command(self, state: np.ndarray) -> np.ndarray:
        """What they want at `state` [5], [2] px."""
        self._seen.append(state)
        self._off = KEEPS * self._off + np.sqrt(1 - KEEPS**2) * self._random.normal(0, TREMBLE, 2)
        command = np.clip(self._expert.act({"state": self._seen[0]}) + self._off, 0, 512)
        self.recent.append(command)
        return command


@dataclass(frozen=True)
class Driven:
    """success: share of episodes with a score of 1. seconds: until then, STEPS where never, mean. score: mean."""

    success: float
    seconds: float
    score: float


def episodes(policy: DiffusionPolicy, seeds: Sequence[int], owned: np.ndarray, *, told: bool = True) -> Driven:
    """An episode from every start; what is not `owned` [2] is the policy's. told: of what the person does."""
    envs, people = [PushT(max_steps=STEPS) for _ in seeds], [ShakyPerson(seed) for seed in seeds]
    noise = [generators(seed) for seed in seeds]
    histories = [History(policy.spec.n_obs_steps) for _ in seeds]
    keys, now = list(policy.spec.observations), policy.spec.n_obs_steps - 1
    shared = SharedControl(policy, rounds=ROUNDS, fading=FADING)
    best, length = np.zeros(len(seeds)), np.full(len(seeds), STEPS)
    for env, seed in zip(envs, seeds, strict=True):
        env.reset(seed)
    chunk = np.zeros((len(seeds), policy.spec.horizon, 2))
    for step in range(STEPS):
        going = [row for row in range(len(seeds)) if length[row] == STEPS]
        if not going:
            break
        commands = np.zeros((len(seeds), 2))
        for row in going:
            seen = envs[row].observe([*keys, "state"])
            histories[row].observe({key: seen[key] for key in keys})
            if owned.any():
                commands[row] = people[row].command(seen["state"])
        if step % EVERY == 0 and not owned.all():
            said = [extrapolated(np.array(person.recent), FADING) for person in people] if owned.any() else None
            shared.own(owned if told else None, None if said is None else np.stack(said))
            stacked = [history.stacked() for history in histories]
            obs = {key: np.stack([each[key] for each in stacked]) for key in keys}
            first, later = zip(*noise, strict=True)
            chunk = policy.predict(obs, noise_generator=list(first), generator=list(later))["action_pred"]
        for row in going:
            action = np.where(owned, commands[row], chunk[row, now + step % EVERY])
            reward, done = envs[row].step(action)
            best[row] = max(best[row], reward)
            if done and reward >= 1.0:
                length[row] = step + 1
    shared.own(None)
    return Driven(float((best >= 1.0).mean()), float(length.mean() / envs[0].control_rate), float(best.mean()))


def two_ways(n: int, random: np.random.Generator) -> np.ndarray:
    """Chunks [n, 8, 2] that go one way or the other, as often, both values the same way."""
    size = random.choice([-1.0, 1.0], (n, 1)) * random.uniform(0.5, 1.0, (n, 1))
    t = np.linspace(0.3, 1.3, 8)
    chunk = np.stack([size * t, size * np.sqrt(t)], axis=-1) + random.normal(0, 0.03, (n, 8, 2))
    return chunk.astype(np.float32)


def agreement(seed: int) -> dict[str, float]:
    """How often the free value goes the owned one's way: told by guidance, by setting alone, and not at all."""
    random = np.random.default_rng(seed)
    nothing = np.zeros((4000, 1, 1), np.float32)
    small = {"name": "unet1d", "channels": [16, 32], "n_groups": 4, "kernel_size": 3}
    chunks = two_ways(4000, random)
    policy = trained({"state": nothing}, chunks, steps=500, batch_size=128, seed=seed, denoiser=small)
    person, found = two_ways(200, random), dict[str, float]()
    for name, rounds in (("guided", ROUNDS), ("set alone", 0), ("independent", None)):
        shared = SharedControl(policy, rounds=rounds or 0)
        shared.own(None if rounds is None else AXIS, person[:, :1])
        noise = torch.Generator().manual_seed(seed)
        chunk = policy.predict({"state": nothing[:200]}, noise_generator=noise)["action_pred"]
        shared.own(None)
        found[name] = float((np.sign(chunk[:, :, 1].mean(1)) == np.sign(person[:, :, 0].mean(1))).mean())
    return found


def measure(seed: int) -> Measured:
    return compare(bundles.load(pusht(seed)), seed)


def compare(policy: DiffusionPolicy, seed: int) -> Measured:
    ways = agreement(seed)
    seeds = range(100_000 + 1000 * seed, 100_000 + 1000 * seed + STARTS)
    alone = episodes(policy, seeds, ~AXIS | AXIS)
    untold, shared = episodes(policy, seeds, AXIS, told=False), episodes(policy, seeds, AXIS)
    measured = {"agrees": ways["guided"], "success": shared.success, "seconds": shared.seconds, "score": shared.score}
    baseline = {"agrees, set alone": ways["set alone"], "agrees, independent": ways["independent"]}
    for name, done in (("full teleoperation", alone), ("not told", untold)):
        baseline |= {f"{name} success": done.success, f"{name} seconds": done.seconds, f"{name} score": done.score}
    better = shared.success >= alone.success + 0.1 and shared.seconds < alone.seconds
    return Measured(measured, baseline, ways["guided"] >= 0.95 and better)


SYSTEM = System(
    name="shared_control",
    what="a late and shaky person steers one axis of PushT's finger, the policy the other",
    bar="of two ways both values go one in at least 95 %; success at least 0.1 above a person's with both axes, sooner",
    measure=measure,
)
