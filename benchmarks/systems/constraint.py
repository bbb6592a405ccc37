"""A disc that PushT's finger has to keep out of: `fit constraint`, and what cutting the finished chunk does instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.envs.pusht.simulator import PushT, initial_state
from action_diffusion.envs.rollout import rollout
from action_diffusion.options.extensions import ConstraintOptions
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.constraint import OPTIONS, Constraint
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Acting, Encoded
from benchmarks.rows.policies import pusht
from benchmarks.rows.system import Measured, System

DISC = (130.0, 410.0, 30.0)
"""x, y, radius, px: where the finger passes on its way round the block in four episodes of ten."""
MARGIN = 12.0
"""px: the finger cuts the corners of its targets' path, which it follows by a fifth of a second."""
STARTS = 50


class Cut(Constraint):
    """What is done where chunks are limited when they are finished: each action by itself, to the nearest edge."""

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        action = self.policy.unnormalize_action(normalized, seen.obs)
        x, y, radius = torch.tensor([*DISC[:2], DISC[2] + MARGIN])
        offset = action - torch.stack([x, y])
        distance = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        edge = offset * (radius / distance.clamp_min(1e-6))
        moved = torch.where(distance < radius, action - offset + edge, action)
        return self.policy.normalize_action(moved, seen.obs), {}

    def hooks(self, seen: Encoded) -> Sequence[Any]:
        return ()


class Afterwards(Constraint):
    """The projection and the guarantee for the finished chunk alone."""

    def hooks(self, seen: Encoded) -> Sequence[Any]:
        return ()


@dataclass(frozen=True)
class Driven:
    """score: mean. inside: control steps with the finger in the disc. crossing: share of episodes that have some."""

    score: float
    inside: int
    crossing: float


def drive(policy: DiffusionPolicy, extensions: Sequence[Acting], seeds: Sequence[int]) -> Driven:
    """An episode from every start, in which the finger is watched."""
    inside: dict[int, int] = dict.fromkeys(seeds, 0)

    class Watched(PushT):
        def reset(self, seed: int) -> None:
            super().reset(seed)
            self.seed = seed

        def step(self, action: np.ndarray) -> tuple[float, bool]:
            result = super().step(action)
            x, y = self.observe(["agent_pos"])["agent_pos"]
            inside[self.seed] += bool(np.hypot(x - DISC[0], y - DISC[1]) < DISC[2])
            return result

    policy.extensions = extensions
    keys = list(policy.spec.observations)
    episodes = rollout(policy=policy, make_env=Watched, seeds=seeds, keys=keys, n_envs=25, policy_batch=25)
    policy.extensions = ()
    steps = np.array(list(inside.values()))
    return Driven(float(np.mean([episode.score for episode in episodes])), int(steps.sum()), float((steps > 0).mean()))


def starts(first: int) -> list[int]:
    """Seeds whose finger begins outside of the disc and its margin."""
    found, seed = list[int](), first
    while len(found) < STARTS:
        x, y = initial_state(seed)[:2]
        if np.hypot(x - DISC[0], y - DISC[1]) > DISC[2] + MARGIN + 10:
            found.append(seed)
        seed += 1
    return found


def limits(policy: DiffusionPolicy, **given: Any) -> Fitted:
    """As `fit constraint` stores them."""
    options = ConstraintOptions(
        bundle="-", discs=[list(DISC)], margin=MARGIN, position=next(iter(policy.spec.states)), **given
    )
    return Fitted({name: value for name, value in vars(options).items() if name in OPTIONS})


def measure(seed: int) -> Measured:
    policy = bundles.load(pusht(seed))
    return compare(policy, starts(100_000 + 1000 * seed))


def compare(policy: DiffusionPolicy, seeds: Sequence[int]) -> Measured:
    fitted = limits(policy)
    ways: dict[str, Sequence[Extension]] = {
        "plain": [],
        "cut": [Cut(policy, fitted)],
        "afterwards": [Afterwards(policy, fitted)],
        "constraint": [Constraint(policy, fitted)],
    }
    driven = {name: drive(policy, extensions, seeds) for name, extensions in ways.items()}
    plain, found = driven["plain"], driven["constraint"]
    fewer = 1 - found.inside / max(plain.inside, 1)
    baseline: dict[str, float] = {"plain crossing": plain.crossing}
    for name in ("plain", "cut", "afterwards"):
        baseline |= {f"{name} inside": driven[name].inside, f"{name} score": driven[name].score}
    return Measured(
        {"inside": found.inside, "fewer": fewer, "score": found.score},
        baseline,
        plain.inside >= STARTS / 4 and fewer >= 0.9 and found.score >= plain.score - 0.05,
    )


SYSTEM = System(
    name="constraint",
    what="a disc of 30 px in the way of PushT's finger: control steps inside, of 50 episodes",
    bar="at least 90 % fewer control steps inside than without, at a score within 0.05",
    measure=measure,
)
