"""`action-diffusion collect`: a scripted expert's episodes into a replay buffer.

A policy that learned only from clean episodes has never seen how to come back from its own mistakes. So an
episode is disturbed now and then: for 3 to 8 steps the simulator executes the expert's action plus an offset,
while the action *recorded* stays the one that the expert wanted.

    state     s0    s1    s2    s3    s4
    recorded  a0    a1    a2    a3    a4       right in the state that it stands beside
    executed  a0    a1+d  a2+d  a3+d  a4

Source: Laskey et al., "DART: Noise Injection for Robust Imitation Learning" (CoRL 2017).

The demonstrations in the package, `datasets/embedded/pusht_expert.zarr.zip`, are made anew by

    action-diffusion collect task=pusht_state agent=expert episodes=500 output=pusht_expert.zarr.zip
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from action_diffusion import __version__, envs
from action_diffusion.datasets.progress import progress
from action_diffusion.datasets.replay_buffer import ReplayBuffer
from action_diffusion.envs.base import Env
from action_diffusion.errors import InputError, unknown

EXPERTS = {
    "pusht": "action_diffusion.envs.pusht_expert:PushTExpert",
}
FIRST_TEST_SEED = 100_000  # evaluations begin here; no demonstration does


class Expert(Protocol):
    """What a scripted expert offers: made with a seed, told of each new episode, asked for one action a step."""

    def reset(self, state: np.ndarray) -> None: ...

    def act(self, state: np.ndarray) -> np.ndarray: ...


class Disturbance:
    """Offsets to executed actions: with probability 0.03 a step one begins, and stays for 3 to 8 steps.

    size: standard deviation of each of its components, in the action's unit; 0 for none.
    """

    def __init__(self, *, size: float, random: np.random.Generator) -> None:
        self._size = size
        self._random = random
        self._left = 0
        self._offset: np.ndarray | float = 0.0

    def applied(self, action: np.ndarray) -> np.ndarray:
        """What to execute instead of `action` [A]."""
        if self._left == 0 and self._random.random() < 0.03:
            self._left = int(self._random.integers(3, 9))
            self._offset = self._random.normal(0.0, self._size, action.shape)
        if self._left == 0:
            return action
        self._left -= 1
        return action + self._offset


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """`collect` with the values of `configs/collect.yaml` (plain data)."""
    env = config["task"]["env"]
    if env is None:
        raise InputError(f"task={config['task']['name']} has no simulator to collect in")
    return collect(
        env_name=env["name"],
        agent_name=config["agent"],
        episodes=config["episodes"],
        seed=config["seed"],
        output=config["output"],
        min_score=config["min_score"],
    )


def collect(
    *,
    env_name: str,
    agent_name: str = "expert",
    episodes: int,
    seed: int = 0,
    output: str | Path,
    perturbation: float = 15.0,
    min_score: float = 0.98,
    max_attempts: int | None = None,
) -> dict[str, Any]:
    """Write `episodes` episodes of an expert to the replay buffer `output` (DIR.zarr or FILE.zarr.zip).

    Starts are `seed`, `seed` + 1, …; what is collected depends on nothing else. An episode whose score stays
    below `min_score` is discarded, and counted. `perturbation` is the standard deviation of the disturbances in
    the action's unit. At most `max_attempts` (3 x `episodes` + 10) episodes are tried; Ctrl-C ends early too.
    Either way the episodes so far are kept.

    Columns: `state` float32 [N, 5], `action` float32 [N, 2], `reward` float32 [N], the last for the step that
    the action began. Returns the numbers to report. Raises `InputError` for an unknown environment or agent, an
    output that exists, starts that belong to evaluation, and where not one episode was good enough.
    """
    output = Path(output).expanduser()
    limit = max_attempts if max_attempts is not None else 3 * episodes + 10
    _check(env_name, agent_name, episodes, seed, seed + limit, output)
    kept: list[dict[str, np.ndarray]] = []
    starts: list[int] = []
    discarded, interrupted = 0, False
    env = envs.make(env_name)
    try:
        with progress(f"collecting {episodes} episodes", episodes) as advance:
            for start in range(seed, seed + limit):
                episode = _episode(env, env_name, start, perturbation)
                if episode["reward"].max() < min_score:
                    discarded += 1
                    continue
                kept.append(episode)
                starts.append(start)
                advance(1)
                if len(kept) == episodes:
                    break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        env.close()
    if not kept:
        raise InputError(f"nothing collected: {discarded} episodes scored below min_score={min_score}")
    attrs = {
        "task": env_name,
        "source": "scripted expert",
        "version": __version__,
        "control_rate": env.control_rate,
        "perturbation": perturbation,
        "seeds": starts,
    }
    _buffer(kept, attrs).save(output)
    return _summary(kept, discarded=discarded, wanted=episodes, interrupted=interrupted, output=output)


def _check(env_name: str, agent_name: str, episodes: int, first: int, end: int, output: Path) -> None:
    if env_name not in EXPERTS:
        raise unknown("environment", env_name, EXPERTS, where="the scripted experts")
    if agent_name != "expert":
        raise unknown("agent", agent_name, ["expert"])
    if episodes < 1:
        raise InputError(f"episodes={episodes}: collect at least one")
    if first < 0 or end > FIRST_TEST_SEED:
        raise InputError(
            f"seed={first}: demonstrations may use the starts 0 to {FIRST_TEST_SEED - 1}, and this one could "
            f"need those up to {end - 1}; evaluations begin at {FIRST_TEST_SEED}"
        )
    if output.exists():
        raise InputError(f"output={output} exists: choose another path, or remove it")


def _episode(env: Env, env_name: str, start: int, perturbation: float) -> dict[str, np.ndarray]:
    """One episode from `start`: columns of T rows."""
    module, _, name = EXPERTS[env_name].partition(":")
    expert: Expert = getattr(importlib.import_module(module), name)(seed=start)
    disturbance = Disturbance(size=perturbation, random=np.random.default_rng(start))
    rows: dict[str, list[Any]] = {"state": [], "action": [], "reward": []}
    env.reset(start)
    state = env.observe(["state"])["state"]
    expert.reset(state)
    done = False
    while not done:
        action = expert.act(state)
        rows["state"].append(state)
        rows["action"].append(action)
        reward, done = env.step(disturbance.applied(action))
        rows["reward"].append(reward)
        state = env.observe(["state"])["state"]
    return {key: np.asarray(values, dtype=np.float32) for key, values in rows.items()}


def _buffer(episodes: list[dict[str, np.ndarray]], attrs: Mapping[str, Any]) -> ReplayBuffer:
    columns = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    return ReplayBuffer.from_arrays(columns, np.cumsum([len(episode["reward"]) for episode in episodes]), attrs)


def _summary(
    episodes: list[dict[str, np.ndarray]], *, discarded: int, wanted: int, interrupted: bool, output: Path
) -> dict[str, Any]:
    lengths = [len(episode["reward"]) for episode in episodes]
    summary: dict[str, Any] = {
        "output": str(output),
        "episodes": len(episodes),
        "steps": sum(lengths),
        "median_length": int(np.median(lengths)),
        "mean_score": round(float(np.mean([episode["reward"].max() for episode in episodes])), 4),
        "discarded": discarded,
    }
    if len(episodes) < wanted:
        why = "interrupted" if interrupted else "attempts used up"
        summary["incomplete"] = f"{why}: {len(episodes)} of {wanted} episodes kept"
    return summary
