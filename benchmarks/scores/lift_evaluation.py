"""How long 20 Lift episodes with two cameras take, and how long where every step is rendered in one process.

    python -m benchmarks.scores.lift_evaluation [n_episodes=20] [max_steps=400]

Both drive the same untrained policy (`resnet18_small`, 20 DDIM steps) from the same starts, with the same renderer; one
process asks it for one row at a time. The clock includes the start of the simulators. As nothing is lifted, every
episode lasts for `max_steps`; with fewer, the start weighs more.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from action_diffusion import envs
from benchmarks.command import command, options, whole

if TYPE_CHECKING:  # the simulators' processes import this module, and need none of it
    from action_diffusion.policy.policy import DiffusionPolicy

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
BATCH = 4


class EveryFrame:
    """Lift as most stacks evaluate it: both cameras are rendered in every step."""

    def __init__(self, max_steps: int) -> None:
        self._env = envs.make("lift", max_steps=max_steps)
        self.max_steps, self.action_shape = self._env.max_steps, self._env.action_shape
        self.control_rate = self._env.control_rate

    def reset(self, seed: int) -> None:
        self._env.reset(seed)
        self._seen = self._env.observe(CAMERAS)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        outcome = self._env.step(action)
        self._seen = self._env.observe(CAMERAS)
        return outcome

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        return self._seen

    def render(self, size: int = 256) -> np.ndarray:
        return self._env.render(size)

    def close(self) -> None:
        self._env.close()


def untrained_policy() -> DiffusionPolicy:
    """A policy of the usual size for images, with random weights."""
    import torch

    from action_diffusion.policy.build import build_policy
    from action_diffusion.policy.model import normalizer
    from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

    torch.manual_seed(0)
    spec = PolicySpec(
        observations={key: ObservationSpec(shape=(84, 84, 3), dtype="uint8", kind="image") for key in CAMERAS},
        action=ActionSpec(shape=(7,)),
        n_obs_steps=2,
        horizon=16,
        n_action_steps=8,
        control_rate=20.0,
        normalizer={"action": normalizer.fit(np.array([[-1.0] * 7, [1.0] * 7]))},
    )
    config = {
        "normalizer": {"default": "minmax"},
        "encoder": {"name": "observation", "backbone": "resnet18", "width": 0.25, "stages": 3, "crop": [76, 76]},
        "denoiser": {"name": "unet1d", "channels": [48, 96, 192]},
        "process": {"name": "diffusion", "prediction": "sample"},
        "sampler": {"scheduler": "ddim", "num_inference_steps": 20},
        "objective": {"loss": "mse"},
    }
    return build_policy(config, spec).eval()


@command
def main(words: Sequence[str]) -> int:
    from action_diffusion.envs.rollout import rollout

    given = options(words, {"n_episodes": "20", "max_steps": "400"})
    n_episodes, max_steps = whole("n_episodes", given["n_episodes"]), whole("max_steps", given["max_steps"])
    policy, seeds, at_once = untrained_policy(), range(100_000, 100_000 + n_episodes), 2 * (os.cpu_count() or 1)
    settings: dict[str, Any] = {"policy": policy, "seeds": seeds, "keys": CAMERAS}
    began = time.perf_counter()
    ours = rollout(
        make_env=functools.partial(envs.make, "lift", max_steps=max_steps),
        n_envs=at_once,
        workers=at_once,
        policy_batch=BATCH,
        **settings,
    )
    middle = time.perf_counter()
    plain = rollout(make_env=lambda: EveryFrame(max_steps), n_envs=1, policy_batch=1, **settings)
    end = time.perf_counter()
    steps = [sum(episode.n_steps for episode in episodes) for episodes in (ours, plain)]
    print(f"{len(seeds)} episodes, {steps[0]} and {steps[1]} steps, two cameras of 84 x 84")
    print(f"frames that the policy looks at, simulators in processes of their own: {middle - began:.1f} s")
    print(f"every frame, one process: {end - middle:.1f} s; ratio {(end - middle) / (middle - began):.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
