"""One episode in real time: observe, think, check, command, at every tick of the control rate.

Inference is synchronous: at the ticks that need a new chunk the command is late by what the policy took, and ticks
that pass meanwhile are missed. `lateness_ms` says how late each command was, so that this is measured, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from action_diffusion.deploy.clock import Clock, Pacer
from action_diffusion.deploy.gate import Gate
from action_diffusion.deploy.robots import Robot
from action_diffusion.envs.rollout import Policy, generators
from action_diffusion.errors import InputError
from action_diffusion.policy.agent import Agent


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What happened at one tick.

    Attributes:
        seed: the episode's start.
        step: counted from 0.
        t: when the command was sent, s since the first tick.
        action: the command that the robot follows, [A] in the data's units; None before the first.
        reward: in [0, 1], where something measures one.
        inference_ms: what the policy took; None where no chunk was due.
        lateness_ms: from the tick to the command.
        missed_ticks: ticks without a command between the step before and this one.
        interventions: why the gate kept a command from the robot; empty where it did not.
    """

    seed: int
    step: int
    t: float
    action: list[float] | None
    reward: float | None
    inference_ms: float | None
    lateness_ms: float
    missed_ticks: int
    interventions: list[str]


class Outcome(NamedTuple):
    """How an episode ended: after how many steps, and its largest reward, where something measured one."""

    steps: int
    score: float | None


def run_episode(
    *,
    policy: Policy,
    robot: Robot,
    agent: Agent,
    gate: Gate,
    clock: Clock,
    log: Callable[[StepRecord], None],
    seed: int,
    keys: Sequence[str],
) -> Outcome:
    """Run `policy` on `robot` until the episode is over, and hand every step to `log`.

    The policy draws its noise as in `envs.rollout` with `policy_batch=1`: on a clock that stands still while it
    thinks, an episode in a simulator equals the evaluated one. A chunk or a command that must not be executed is
    not an error: the robot holds, the log says why, and a refused chunk is replaced at the next tick. The robot is
    stopped when this returns or raises, Ctrl-C included.

    Args:
        keys: the observations that the policy wants; they are only read where it looks at them.

    Raises:
        InputError: for observations that the robot does not have or that the policy does not take.
    """
    episode = _Episode(policy=policy, robot=robot, agent=agent, gate=gate, clock=clock, seed=seed, keys=keys)
    done, steps, score = False, 0, None
    try:
        robot.begin(seed)
        while not done:
            record, done = episode.step()
            steps += 1
            if record.reward is not None:
                score = record.reward if score is None else max(score, record.reward)
            log(record)
    finally:
        robot.stop()
    return Outcome(steps, score)


class _Episode:
    """An episode under way: the parts, and where it stands."""

    def __init__(
        self,
        *,
        policy: Policy,
        robot: Robot,
        agent: Agent,
        gate: Gate,
        clock: Clock,
        seed: int,
        keys: Sequence[str],
    ) -> None:
        self._policy, self._robot, self._agent, self._gate, self._clock = policy, robot, agent, gate, clock
        self._seed, self._keys = seed, keys
        self._noise_generator, self._generator = generators(seed)
        self._pacer = Pacer(clock=clock, rate=robot.control_rate)
        self._start = 0.0
        self._steps = 0
        agent.reset()
        gate.reset()

    def step(self) -> tuple[StepRecord, bool]:
        """Wait for the next tick and live through it; also returns whether the episode is over."""
        tick, missed = self._pacer.wait()
        if self._steps == 0:
            self._start = tick
        if self._agent.will_be_seen:
            self._agent.observe(self._robot.observe(self._keys))
        seconds, refusal = self._think() if self._agent.needs_chunk else (None, None)
        if refusal is None:
            action = self._agent.act()
            refusal = self._gate.refuse(action)
        sent = self._clock.now()
        reward, done = self._robot.command(action) if refusal is None else self._robot.hold()
        record = StepRecord(
            seed=self._seed,
            step=self._steps,
            t=sent - self._start,
            action=None if self._gate.last is None else self._gate.last.tolist(),
            reward=None if reward is None else float(reward),
            inference_ms=None if seconds is None else 1e3 * seconds,
            lateness_ms=1e3 * (sent - tick),
            missed_ticks=missed,
            interventions=[] if refusal is None else [refusal],
        )
        self._steps += 1
        return record, done or self._steps >= self._robot.max_steps

    def _think(self) -> tuple[float, str | None]:
        """Ask for a chunk and hand it to the agent. Returns the seconds it took, and why it was refused if it was."""
        history = self._agent.history()
        before = self._clock.now()
        chunk = _predict(self._policy, history, self._noise_generator, self._generator)
        seconds = self._clock.now() - before
        try:
            self._agent.accept(chunk)
        except InputError as error:
            return seconds, str(error)
        return seconds, None


def _predict(
    policy: Policy, history: dict[str, np.ndarray], noise_generator: torch.Generator, generator: torch.Generator
) -> np.ndarray:
    """A chunk [H, A] for one history, by a call with a batch of one."""
    obs = {key: value[None] for key, value in history.items()}
    predicted = policy.predict(obs, noise_generator=[noise_generator], generator=[generator])
    return np.asarray(predicted["action_pred"])[0]
