"""`action-diffusion collect`: a scripted expert's episodes into a replay buffer.

A policy that learned only from the usual starts has never seen how to come back from its own mistakes. So most
episodes begin somewhere else:

    30 %   at a start of the task
    40 %   where the expert got to after 10 to 89 steps of acting on a wrong belief of where the block is
    30 %   with the task nearly done, where most of a policy's small corrections are needed (in PushT; elsewhere at
           a start of the task)

and only what follows is recorded, undisturbed: the actions of a chunk are then all consequences of the state that
the chunk begins in. (Disturbing the expert while it is recorded, as DART does (Laskey et al. 2017), puts reactions to
unforeseeable pushes into the later steps of a chunk; policies trained on such episodes scored no better.)

The demonstrations in the package, `datasets/embedded/pusht_expert.zarr.zip`, are 932 episodes. The first 400 are made
anew by

    action-diffusion collect task=pusht_state agent=expert episodes=200 output=a.zarr
    action-diffusion collect task=pusht_state agent=expert episodes=200 seed=1000 output=b.zarr

The other 532 begin where a policy that learned from these, in 1,000 optimiser steps, got to from the starts 2000 to
2199, once to three times an episode (`visited_by=` does so once): where it goes wrong is where it needs to be shown
the way (DAgger: Ross et al. 2011).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from action_diffusion import __version__, envs
from action_diffusion.datasets.demos import pack
from action_diffusion.datasets.progress import progress
from action_diffusion.datasets.replay_buffer import ReplayBuffer
from action_diffusion.envs.base import Env
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError, unknown
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.agent import Agent
from action_diffusion.policy.policy import DiffusionPolicy

EXPERTS = {
    "pusht": "action_diffusion.envs.pusht_expert:PushTExpert",
    "lift": "action_diffusion.envs.manipulation_expert:lift",
    "can": "action_diffusion.envs.manipulation_expert:can",
    "square": "action_diffusion.envs.manipulation_expert:square",
}
WANDERED, NEARLY_DONE = 0.4, 0.3  # shares of the episodes that begin so
STREAM = 13  # of the random numbers that decide where an episode begins
MAX_STEPS = 500  # those before the recording counted in
FIRST_TEST_SEED = 100_000  # evaluations begin here; no demonstration does


class Simulator(Env, Protocol):
    """A simulator that can begin anywhere, and says what is worth recording.

    Attributes:
        recorded: the low-dimensional observations that a recording holds, a column each.
    """

    @property
    def recorded(self) -> tuple[str, ...]: ...

    def restore(self, state: np.ndarray) -> None: ...

    def metadata(self) -> dict[str, Any]:
        """What a recording says of the simulator: attributes of its buffer."""
        ...

    def episode_metadata(self) -> dict[str, str]:
        """What it says of the episode under way: attributes of a demo, as robomimic's files have them."""
        ...


class Expert(Protocol):
    """What a scripted expert offers: made with a seed, told of each new episode, asked for one action a step.

    Attributes:
        observations: what it acts on.
    """

    observations: tuple[str, ...]

    def reset(self) -> None: ...

    def act(self, observation: Mapping[str, np.ndarray], error: np.ndarray | None = None) -> np.ndarray:
        """The action for an observation, believed to be off by `error`."""
        ...

    def misbelief(self, random: np.random.Generator) -> np.ndarray:
        """An error for `act`."""
        ...

    def nearly_done(self, random: np.random.Generator) -> np.ndarray | None:
        """A state from which little is left to do, for `Simulator.restore`; None where there is none to be had."""
        ...


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """`collect` with the values of `configs/collect.yaml` (plain data)."""
    env = config["task"]["env"]
    if env is None:
        raise InputError(f"task={config['task']['name']} has no simulator to collect in")
    observations: Mapping[str, Mapping[str, Any]] = config["task"]["observations"] or {}
    return collect(
        env_name=env["name"],
        # A camera whose pictures are kept under another name is rendered from the states when it is trained on.
        cameras=[key for key, value in observations.items() if value["kind"] == "image" and value["source"] == key],
        agent_name=config["agent"],
        episodes=config["episodes"],
        seed=config["seed"],
        output=config["output"],
        min_score=config["min_score"],
        visited_by=None if config["visited_by"] is None else bundles.load(config["visited_by"]),
    )


def collect(
    *,
    env_name: str,
    cameras: Sequence[str] = (),
    agent_name: str = "expert",
    episodes: int,
    seed: int = 0,
    output: str | Path,
    min_score: float = 0.98,
    visited_by: DiffusionPolicy | None = None,
    max_attempts: int | None = None,
) -> dict[str, Any]:
    """Write `episodes` episodes of an expert to the replay buffer `output` (DIR.zarr or FILE.zarr.zip).

    Starts are `seed`, `seed` + 1, …; what is collected depends on nothing else. An episode whose score stays
    below `min_score` is discarded, and counted. At most `max_attempts` (3 x `episodes` + 10) episodes are tried;
    Ctrl-C ends early too. Either way the episodes so far are kept.

    visited_by: every episode begins where this policy gets to in 10 to 150 steps, instead of as usual.

    Columns: what the simulator says is worth recording and the `cameras`, as observed; `action` float32 [N, A], and
    `reward` float32 [N] for the step that the action began. Returns the numbers to report. Raises `InputError` for an
    unknown environment or agent, an output that exists, starts that belong to evaluation, and where not one episode
    was good enough.
    """
    output = Path(output).expanduser()
    limit = max_attempts if max_attempts is not None else 3 * episodes + 10
    _check(env_name, agent_name, episodes, seed, seed + limit, output)
    kept: list[dict[str, np.ndarray]] = []
    scenes: list[dict[str, str]] = []
    starts: list[int] = []
    discarded, interrupted = 0, False
    env = cast(Simulator, envs.make(env_name, max_steps=MAX_STEPS))
    try:
        with progress(f"collecting {episodes} episodes", episodes) as advance:
            for start in range(seed, seed + limit):
                episode = _episode(env, env_name, start, visited_by, cameras)
                if episode["reward"].max() < min_score:
                    discarded += 1
                    continue
                kept.append(episode)
                scenes.append(env.episode_metadata())
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
        "seeds": starts,
        **env.metadata(),
    }
    if any(scenes):
        attrs["hdf5_attributes"] = pack(((f"data/demo_{i}", scene) for i, scene in enumerate(scenes)), str(output))
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


def _episode(
    env: Simulator,
    env_name: str,
    start: int,
    visited_by: DiffusionPolicy | None = None,
    cameras: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """One episode from `start`: columns of T rows. Without a row to record, its reward is a single 0."""
    module, _, name = EXPERTS[env_name].partition(":")
    expert: Expert = getattr(importlib.import_module(module), name)(seed=start)
    random = np.random.default_rng([STREAM, start])
    env.reset(start)
    expert.reset()
    over = _begin(env, expert, random) if visited_by is None else _follow(env, visited_by, start, random)
    if over:
        return {"reward": np.zeros(1, np.float32)}
    expert.reset()
    keys = [*env.recorded, *cameras]
    rows: list[dict[str, Any]] = []
    done = False
    while not done:
        observation = env.observe(keys)
        action = expert.act(observation)
        reward, done = env.step(action)
        rows.append({**observation, "action": np.float32(action), "reward": np.float32(reward)})
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _begin(env: Simulator, expert: Expert, random: np.random.Generator) -> bool:
    """Go to where the recording begins (see the module); returns whether the episode is over already."""
    kind = random.random()
    if kind > 1 - NEARLY_DONE:
        state = expert.nearly_done(random)
        if state is not None:
            env.restore(state)
        return False
    left, wandering, error = 0, int(random.integers(10, 90)) if kind < WANDERED else 0, None
    for _ in range(wandering):
        if left == 0:
            left, error = int(random.integers(5, 25)), expert.misbelief(random)
        left -= 1
        if env.step(expert.act(env.observe(expert.observations), error))[1]:
            return True
    return False


def _follow(env: Env, policy: DiffusionPolicy, start: int, random: np.random.Generator) -> bool:
    """Go where the policy gets to in 10 to 149 steps; returns whether the episode is over already."""
    agent = Agent(n_obs_steps=policy.spec.n_obs_steps, n_action_steps=policy.spec.n_action_steps)
    first_noise, step_noise = generators(start)
    for _ in range(int(random.integers(10, 150))):
        agent.observe(env.observe(list(policy.spec.observations)))
        if agent.needs_chunk:
            history = {key: value[None] for key, value in agent.history().items()}
            chunk = policy.predict(history, noise_generator=[first_noise], generator=[step_noise])
            agent.accept(chunk["action_pred"][0])
        if env.step(agent.act())[1]:
            return True
    return False


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
