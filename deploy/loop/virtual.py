"""Simulated robots on a virtual clock: every chunk takes exactly `delay` control steps, however long it really takes.

    control step     0          1       …       d          d+1
    each episode     observe, ask               receive
                     hold       hold            command    command

Many episodes walk side by side, so that what they ask for at the same step is predicted in batches. As in
`envs.rollout`, a policy call always has `policy_batch` rows, and a start sits in the row `seed % policy_batch` and has
noise of its own. So an episode does not depend on its neighbours, meets the same noise whatever the scheduling and the
delay, and without a delay is the evaluated one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from action_diffusion.deploy.loop.prediction import Guidance, predict
from action_diffusion.deploy.robot.robots import Robot
from action_diffusion.envs.rollout import Policy, generators
from action_diffusion.errors import InputError
from action_diffusion.policy.action_queue import ActionQueue, DelayEstimator, Request
from action_diffusion.policy.history import History


@dataclass(frozen=True, kw_only=True)
class VirtualEpisode:
    """One finished episode of T steps.

    Attributes:
        seed: the start.
        score: the maximum reward, in [0, 1].
        commands: [T, A] in the data's units; NaN where the robot held.
        jumps: of every swap, the distance between the command of the new chunk and that of the running one for the
            same instant, in the data's units.
    """

    seed: int
    score: float
    commands: np.ndarray
    jumps: list[float]


def run_episodes(
    *,
    policy: Policy,
    make_robot: Callable[[], Robot],
    seeds: Sequence[int],
    keys: Sequence[str],
    scheduling: str,
    delay: int,
    execution_horizon: int,
    guidance: Guidance,
    policy_batch: int = 25,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[VirtualEpisode]:
    """One episode from every start in `seeds`, in that order, all with a robot of their own.

    Args:
        keys: the observations that the policy wants.
        delay: control steps from the observation to the first command that uses its chunk.
        progress: called with numbers of control steps that add up to `len(seeds) * max_steps`.

    Raises:
        InputError: for numbers that are too small, and for chunks that cannot be executed.
    """
    for name, value, least in (("delay", delay, 0), ("policy_batch", policy_batch, 1), ("n_episodes", len(seeds), 1)):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    walking: list[_Walk] = []
    try:
        for seed in seeds:
            queue = ActionQueue(
                scheduling,
                n_obs_steps=policy.spec.n_obs_steps,
                execution_horizon=execution_horizon,
                delays=DelayEstimator(first=delay),
            )
            walking.append(_Walk(make_robot(), seed, queue, keys, delay))
        running, step = list(walking), 0
        while running:
            for walk in running:
                walk.begin_step(step)
            asking = [walk for walk in running if walk.request is not None]
            while asking:
                asking = _predict(policy, asking, policy_batch, guidance)
            for walk in running:
                walk.act()
                progress(1 if not walk.done else walk.robot.max_steps - step)
            running = [walk for walk in running if not walk.done]
            step += 1
    finally:
        for walk in walking:
            walk.robot.close()
    return [walk.episode() for walk in walking]


def _predict(policy: Policy, asking: Sequence[_Walk], rows: int, guidance: Guidance) -> list[_Walk]:
    """One policy call for as many as have different rows; returns the others. Free rows repeat an observation."""
    chosen: dict[int, _Walk] = {}
    left = [walk for walk in asking if chosen.setdefault(walk.seed % rows, walk) is not walk]
    histories = {row: walk.history.stacked() for row, walk in chosen.items()}
    padding = next(iter(histories.values()))
    obs = {key: np.stack([histories.get(row, padding)[key] for row in range(rows)]) for key in padding}
    pairs = [chosen[row].generators if row in chosen else generators(row) for row in range(rows)]
    chunks, _ = predict(
        policy,
        obs,
        [chosen[row].request if row in chosen else None for row in range(rows)],
        noise_generator=[noise for noise, _ in pairs],
        generator=[steps for _, steps in pairs],
        guidance=guidance,
    )
    for row, walk in chosen.items():
        walk.take(chunks[row])
    return left


class _Walk:
    """One episode under way."""

    def __init__(self, robot: Robot, seed: int, queue: ActionQueue, keys: Sequence[str], delay: int) -> None:
        self.robot, self.seed, self._queue, self._keys, self._delay = robot, seed, queue, keys, delay
        self.history = History(queue.n_obs_steps)
        self.generators = generators(seed)
        self.request: Request | None = None
        self.done = False
        self._arriving: tuple[int, np.ndarray] | None = None
        self._commands: list[np.ndarray | None] = []
        self._rewards: list[float] = []
        self._jumps: list[float] = []
        self._step = 0
        robot.begin(seed)

    def begin_step(self, step: int) -> None:
        """Take what arrives now, and observe; afterwards `request` is what to predict, if anything."""
        self._step = step
        self._queue.begin_step(step)
        self._receive()
        if self._queue.will_be_seen:
            self.history.observe(self.robot.observe(self._keys, self._time).values)
        self.request = self._queue.request() if self._queue.wants_chunk else None

    @property
    def _time(self) -> float:
        return self._step / self.robot.control_rate

    def take(self, chunk: np.ndarray) -> None:
        """The answer to `request`, which becomes known to the robot after the delay."""
        self.request = None
        self._arriving = self._step + self._delay, chunk
        self._receive()

    def _receive(self) -> None:
        if self._arriving is None or self._arriving[0] > self._step:
            return
        chunk, self._arriving = self._arriving[1], None
        try:
            swap = self._queue.receive(chunk)
        except InputError as error:
            raise InputError(f"seed {self.seed}, control step {self._step}: {error}") from None
        if swap is not None and swap.jump is not None:
            self._jumps.append(swap.jump)

    def act(self) -> None:
        """Send the command of this step, or hold."""
        command = self._queue.command()
        reward, done = self.robot.hold() if command is None else self.robot.command([command], self._time)
        self._commands.append(command)
        self._rewards.append(0.0 if reward is None else float(reward))
        self.done = done or len(self._commands) >= self.robot.max_steps

    def episode(self) -> VirtualEpisode:
        shape = next((command.shape for command in self._commands if command is not None), (0,))
        rows = [np.full(shape, np.nan) if command is None else command for command in self._commands]
        return VirtualEpisode(seed=self.seed, score=max(self._rewards), commands=np.asarray(rows), jumps=self._jumps)
