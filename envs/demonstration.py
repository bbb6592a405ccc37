"""One demonstration of a scripted expert: where it begins, and what is recorded of it.

A policy that learned only from the usual starts has never seen how to come back from its own mistakes. So most
episodes begin somewhere else:

    30 %   at a start of the task
    40 %   where the expert got to after 10 to 89 steps of acting on a wrong belief of where the block is
    30 %   with the task nearly done, where most of a policy's small corrections are needed; where such a state is not
           known without simulating, wherever the expert got to before it acted on a wrong belief for 5 to 24 steps

and only what follows is recorded, undisturbed: the actions of a chunk are then all consequences of the state that
the chunk begins in. (Disturbing the expert while it is recorded, as DART does (Laskey et al. 2017), puts reactions to
unforeseeable pushes into the later steps of a chunk; policies trained on such episodes scored no better.)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from action_diffusion import envs
from action_diffusion.envs.base import Env

if TYPE_CHECKING:  # importing torch takes longer than an episode, and processes that only record need none of it
    from action_diffusion.policy.policy import DiffusionPolicy

EXPERTS = {
    "gymnasium": "action_diffusion.envs.gymnasium.metaworld:MetaWorldExpert",
    "pusht": "action_diffusion.envs.pusht.expert:PushTExpert",
    "lift": "action_diffusion.envs.robosuite.expert:lift",
    "can": "action_diffusion.envs.robosuite.expert:can",
    "square": "action_diffusion.envs.robosuite.expert:square",
}
WANDERED, NEARLY_DONE = 0.4, 0.3  # shares of the episodes that begin so
STREAM = 13  # of the random numbers that decide where an episode begins
MAX_STEPS = 500  # those before the recording counted in


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
        steps: about how many it needs, undisturbed.
    """

    observations: tuple[str, ...]
    steps: int

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


class Recording(NamedTuple):
    """One episode: its columns, T rows each, the scene that it took place in, and what the simulator says of itself.

    Nothing was worth recording where there is no column but `reward`.
    """

    columns: dict[str, np.ndarray]
    scene: dict[str, str]
    attrs: dict[str, Any]

    @property
    def score(self) -> float:
        return float(self.columns["reward"].max())


class Source(NamedTuple):
    """What all episodes of a recording have in common.

    settings: of the simulator. visited_by: a bundle, see `collect`.
    """

    env_name: str
    settings: Mapping[str, Any] = {}
    cameras: tuple[str, ...] = ()
    visited_by: str | None = None


class Demonstrator:
    """Records the episodes of `source`. Its simulator, and its policy, are made once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        settings = {"max_steps": MAX_STEPS} | dict(source.settings)
        self._env = cast(Simulator, envs.make(source.env_name, **settings))
        self._policy: DiffusionPolicy | None = None
        if source.visited_by is not None:
            from action_diffusion.policy.bundle import load

            self._policy = load(source.visited_by)

    def record(self, start: int) -> Recording:
        """The episode of `start`."""
        columns = episode(self._env, self._source.env_name, start, self._policy, self._source.cameras)
        attrs = {"control_rate": self._env.control_rate, **self._env.metadata()}
        return Recording(columns, self._env.episode_metadata(), attrs)

    def close(self) -> None:
        self._env.close()


class RecordOrder(NamedTuple):
    """The order to record the episode of `start`, see `workers.SimulatorOrder`."""

    start: int
    seconds: float = 1800.0

    def run(self, demonstrator: Demonstrator, /) -> Recording:
        return demonstrator.record(self.start)


def episode(
    env: Simulator,
    env_name: str,
    start: int,
    visited_by: DiffusionPolicy | None = None,
    cameras: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """One episode from `start`: columns of T rows. Without a row to record, its reward is a single 0."""
    expert = _expert(env, env_name, start)
    random = np.random.default_rng([STREAM, start])
    env.reset(start)
    expert.reset()
    if _begin(env, expert, start, random) if visited_by is None else _follow(env, visited_by, start, random):
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


def _expert(env: Simulator, env_name: str, seed: int) -> Expert:
    module, _, name = EXPERTS[env_name].partition(":")
    part = getattr(importlib.import_module(module), name)
    told = {"about": env.metadata()} if env_name == "gymnasium" else {}  # which of all environments it is
    return cast(Expert, part(seed=seed, **told))


def _begin(env: Simulator, expert: Expert, start: int, random: np.random.Generator) -> bool:
    """Go to where the recording begins (see the module); returns whether the episode is over already."""
    kind = random.random()
    if kind > 1 - NEARLY_DONE:
        state = expert.nearly_done(random)
        if state is not None:
            env.restore(state)
        elif _late(env, expert, random):
            env.reset(start)
        return False
    left, wandering, error = 0, int(random.integers(10, 90)) if kind < WANDERED else 0, None
    for _ in range(wandering):
        if left == 0:
            left, error = int(random.integers(5, 25)), expert.misbelief(random)
        left -= 1
        if _act(env, expert, error):
            return True
    return False


def _late(env: Simulator, expert: Expert, random: np.random.Generator) -> bool:
    """Act rightly up to anywhere in the episode, then on one wrong belief; returns whether it is over already."""
    right, wrong = int(random.integers(0, expert.steps)), int(random.integers(5, 25))
    error = expert.misbelief(random)
    return any(_act(env, expert, None if step < right else error) for step in range(right + wrong))


def _act(env: Simulator, expert: Expert, error: np.ndarray | None) -> bool:
    return env.step(expert.act(env.observe(expert.observations), error))[1]


def _follow(env: Env, policy: DiffusionPolicy, start: int, random: np.random.Generator) -> bool:
    """Go where the policy gets to in 10 to 149 steps; returns whether the episode is over already."""
    from action_diffusion.envs.rollout import generators
    from action_diffusion.policy.agent import Agent

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
