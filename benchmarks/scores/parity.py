"""Does a policy score in the deploy loop what it scores in `evaluate`?

    python -m benchmarks.scores.parity bundle=DIR [n_episodes=50] [seed=100000] [output=FILE.json]

The same starts with the same noise: once by the rollouts that `evaluate` makes, once by the loop of `deploy` with its
safety gates, on a clock that stands still while the policy thinks. What is left to differ are the commands that a gate
refuses; they are counted.

Exit code: 0 where the mean scores are within 0.03, 1 where they are not, 2 for bad input, 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion import envs
from action_diffusion.deploy.loop.clock import VirtualClock
from action_diffusion.deploy.loop.episode import run_episode
from action_diffusion.deploy.loop.events import StepRecord
from action_diffusion.deploy.loop.gate import Gate, demonstrated
from action_diffusion.deploy.robot import robots
from action_diffusion.envs.rollout import rollout
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.action_queue import ActionQueue
from action_diffusion.policy.history import History
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.progress import progress
from benchmarks.command import command, options, whole
from benchmarks.report import machine

ALLOWED = 0.03
MARGIN = 0.1  # safety.margin of configs/deploy.yaml


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One start: its score by `evaluate` and by the loop, and how many commands the loop's gate refused."""

    seed: int
    evaluated: float
    deployed: float
    refused: int


def evaluated(policy: DiffusionPolicy, seed: int) -> float:
    """The score of the start `seed`, as `evaluate policy_batch=1` finds it."""
    assert policy.spec.env is not None
    make_env = functools.partial(envs.make, **policy.spec.env)
    keys = list(policy.spec.observations)
    return rollout(policy=policy, make_env=make_env, seeds=[seed], keys=keys, n_envs=1, policy_batch=1)[0].score


def deployed(policy: DiffusionPolicy, robot: robots.Robot, seed: int) -> tuple[float, int]:
    """The score of the same start in the deploy loop, and the number of steps in which its gate refused something."""
    spec, steps = policy.spec, list[StepRecord]()
    limits = demonstrated(spec.normalizer["action"], MARGIN).within(robot.limits)
    horizon: dict[str, Any] = {"n_obs_steps": spec.n_obs_steps, "execution_horizon": spec.n_action_steps}
    outcome = run_episode(
        policy=policy,
        robot=robot,
        history=History(spec.n_obs_steps),
        queue=ActionQueue("sync", **horizon),
        gate=Gate(limits=limits),
        clock=VirtualClock(),
        log=steps.append,
        seed=seed,
        keys=list(spec.observations),
    )
    assert outcome.score is not None
    return outcome.score, sum(bool(step.interventions) for step in steps)


@command
def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    given = options(words, {"bundle": "", "n_episodes": "50", "seed": "100000", "output": ""})
    if not given["bundle"]:
        raise InputError("bundle is required: python -m benchmarks.scores.parity bundle=DIR")
    n, seed = whole("n_episodes", given["n_episodes"]), whole("seed", given["seed"], least=0)
    policy = bundles.load(Path(given["bundle"]))
    if policy.spec.env is None:
        raise InputError(f"{given['bundle']}: {policy.spec.task} has no simulator to evaluate in")
    robot, pairs = robots.make("sim_pusht", robots.RobotTask.of(policy.spec)), list[Pair]()
    robots.check_fit(robot, policy.spec)
    with progress("parity", n) as advance:
        for start in range(seed, seed + n):
            before, (after, refused) = evaluated(policy, start), deployed(policy, robot, start)
            pairs.append(Pair(seed=start, evaluated=before, deployed=after, refused=refused))
            advance(1)
    robot.close()
    means = [float(np.mean([getattr(pair, name) for pair in pairs])) for name in ("evaluated", "deployed")]
    same = sum(pair.evaluated == pair.deployed for pair in pairs)
    print(f"evaluate {means[0]:.4f}, deploy {means[1]:.4f}; {same} of {n} starts to the last bit")
    print(f"starts in which the gate refused a command: {sum(pair.refused > 0 for pair in pairs)}")
    if given["output"]:
        with atomic_path(Path(given["output"])) as temporary:
            temporary.write_text(json.dumps({"machine": machine(), "rows": [vars(pair) for pair in pairs]}, indent=1))
    return 0 if abs(means[0] - means[1]) <= ALLOWED else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
