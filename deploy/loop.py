"""One episode in real time: observe, think, check, command, at every tick of the control rate.

Ticks are the control steps of `scheduling.ChunkScheduler`, which says what each one's command is. Where the loop thinks
by itself (`thinking.Thinker`), a command is late by what the policy took, and ticks that pass meanwhile are missed;
`lateness_ms` says how late each command was, so that this is measured, not guessed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from action_diffusion.deploy.clock import Clock, Pacer
from action_diffusion.deploy.gate import Gate
from action_diffusion.deploy.prediction import Guidance, predict
from action_diffusion.deploy.robots import Feedback, Robot
from action_diffusion.deploy.scheduling import ChunkScheduler, Request, Swap
from action_diffusion.deploy.thinking import Thinker, Unavailable
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
        inference_ms: what the policy took for the chunk that arrived; None where none did.
        delay: control steps from that chunk's observation to this step; None where none took over.
        jump: distance between its command and what the chunk before had for the same instant, in the data's units.
        held: no command was sent, and the robot kept to its last one.
        observation_age_ms: from what the robot observed to the tick; None where it was not asked.
        lateness_ms: from the tick to the command.
        missed_ticks: ticks without a command between the step before and this one.
        interventions: why the gate kept a command from the robot, and what the robot's own guards did; mostly empty.
    """

    seed: int
    step: int
    t: float
    action: list[float] | None
    reward: float | None
    inference_ms: float | None
    delay: int | None
    jump: float | None
    held: bool
    observation_age_ms: float | None
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
    scheduler: ChunkScheduler,
    gate: Gate,
    clock: Clock,
    log: Callable[[StepRecord], None],
    seed: int,
    keys: Sequence[str],
    beside: bool = False,
    delay: int = 0,
    guidance: Guidance | None = None,
) -> Outcome:
    """Run `policy` on `robot` until the episode is over, and hand every step to `log`.

    The policy draws its noise as in `envs.rollout` with `policy_batch=1`: on a clock that stands still while it
    thinks, an episode in a simulator equals the evaluated one. A chunk or a command that must not be executed is
    not an error: the robot holds, or goes on with the chunk that it has, the log says why, and a refused chunk is
    replaced at the next tick. The robot is stopped when this returns or raises, Ctrl-C included.

    Args:
        agent: remembers the observations; which chunk is executed when is the scheduler's.
        keys: the observations that the policy wants; they are only read where it looks at them.
        beside: think in a thread, while the loop goes on.
        delay: control steps after which a chunk arrives at the earliest (>= 0).

    Raises:
        InputError: for observations that the robot does not have or that the policy does not take.
    """
    thinker: Thinker[np.ndarray] = Thinker(clock=clock, beside=beside, delay=delay)
    noise_generator, generator = generators(seed)
    think = functools.partial(
        _predict,
        policy=policy,
        noise_generator=noise_generator,
        generator=generator,
        guidance=guidance or Guidance(),
    )
    episode = _Episode(
        robot=robot,
        agent=agent,
        scheduler=scheduler,
        thinker=thinker,
        think=think,
        gate=gate,
        clock=clock,
        seed=seed,
        keys=keys,
    )
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
        thinker.close()
    return Outcome(steps, score)


class _Arrival(NamedTuple):
    """What came of a chunk: seconds of thinking where it arrived, the swap, or why there was none."""

    seconds: float | None
    swap: Swap | None
    refusal: str | None


class _Episode:
    """An episode under way: the parts, and where it stands."""

    def __init__(
        self,
        *,
        robot: Robot,
        agent: Agent,
        scheduler: ChunkScheduler,
        thinker: Thinker[np.ndarray],
        think: Callable[[Request, Mapping[str, np.ndarray]], np.ndarray],
        gate: Gate,
        clock: Clock,
        seed: int,
        keys: Sequence[str],
    ) -> None:
        self._robot, self._agent, self._scheduler, self._gate = robot, agent, scheduler, gate
        self._thinker, self._think, self._clock = thinker, think, clock
        self._seed, self._keys = seed, keys
        self._pacer = Pacer(clock=clock, rate=robot.control_rate)
        self._start = 0.0
        self._control_step = -1
        self._steps = 0
        agent.reset()
        gate.reset()
        scheduler.reset()

    def step(self) -> tuple[StepRecord, bool]:
        """Wait for the next tick and live through it; also returns whether the episode is over."""
        tick, missed = self._pacer.wait()
        if self._steps == 0:
            self._start = tick
        self._control_step += 1 + missed
        self._scheduler.begin_step(self._control_step)
        arrival = self._receive()
        age = None
        if self._scheduler.will_be_seen:
            observation = self._robot.observe(self._keys, tick)
            age = 1e3 * (tick - observation.t)
            self._agent.observe(observation.values)
        if self._scheduler.wants_chunk and (arrival is None or arrival.refusal is None):
            arrival = self._ask(tick) or arrival
        sent, held, refusal, (reward, done) = self._command()
        swap = None if arrival is None else arrival.swap
        reasons = [None if arrival is None else arrival.refusal, refusal]
        record = StepRecord(
            seed=self._seed,
            step=self._steps,
            t=sent - self._start,
            action=None if self._gate.last is None else self._gate.last.tolist(),
            reward=None if reward is None else float(reward),
            inference_ms=None if arrival is None or arrival.seconds is None else 1e3 * arrival.seconds,
            delay=None if swap is None else swap.delay,
            jump=None if swap is None else swap.jump,
            held=held,
            observation_age_ms=age,
            lateness_ms=1e3 * (sent - tick),
            missed_ticks=missed,
            interventions=[reason for reason in reasons if reason is not None] + self._robot.events(),
        )
        self._steps += 1
        return record, done or self._steps >= self._robot.max_steps

    def _ask(self, tick: float) -> _Arrival | None:
        """Ask for a chunk. Where the loop thinks by itself, control steps may pass until it is there."""
        request, history = self._scheduler.request(), self._agent.history()
        self._thinker.ask(request.step, functools.partial(self._think, request, history))
        passed = math.ceil((self._clock.now() - tick) * self._robot.control_rate - 1e-9) - 1
        self._scheduler.begin_step(self._control_step + max(0, passed))
        return self._receive()

    def _receive(self) -> _Arrival | None:
        """Hand a chunk that has arrived to the scheduler."""
        try:
            thought = self._thinker.answer(self._scheduler.step)
        except Unavailable as error:
            self._scheduler.drop()
            return _Arrival(None, None, str(error))
        if thought is None:
            return None
        try:
            swap = self._scheduler.receive(thought.answer)
        except InputError as error:
            return _Arrival(thought.seconds, None, str(error))
        late = None if swap is not None else "the chunk arrived after all of its actions were due"
        return _Arrival(thought.seconds, swap, late)

    def _command(self) -> tuple[float, bool, str | None, Feedback]:
        """Send this step's command, or hold where there is none or the gate refuses it.

        Returns when that was (s), whether the robot held, why the gate refused, and what the robot answers.
        """
        actions = self._scheduler.plan(1 + self._robot.lookahead)
        refusal = self._gate.refuse(actions[0]) if actions else None
        sent = self._clock.now()
        if not actions or refusal is not None:
            return sent, True, refusal, self._robot.hold()
        due = self._start + self._scheduler.step / self._robot.control_rate
        return sent, False, None, self._robot.command([actions[0], *self._gate.ahead(actions[1:])], due)


def _predict(
    request: Request,
    history: Mapping[str, np.ndarray],
    *,
    policy: Policy,
    noise_generator: torch.Generator,
    generator: torch.Generator,
    guidance: Guidance,
) -> np.ndarray:
    """A chunk [H, A] for one history, by a call with a batch of one."""
    obs = {key: value[None] for key, value in history.items()}
    noise: dict[str, Any] = {"noise_generator": [noise_generator], "generator": [generator]}
    return predict(policy, obs, [request], guidance=guidance, **noise)[0]
