"""One episode in real time: observe, think, check, command, at every tick of the control rate.

Ticks are the control steps of `action_queue.ActionQueue`, which says what each one's command is. Where the loop thinks
by itself (`inference_worker`), a command is late by what the policy took, and ticks that pass meanwhile are missed;
`lateness_ms` says how late each command was, so that this is measured, not guessed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from action_diffusion.deploy.loop.clock import Clock, Pacer
from action_diffusion.deploy.loop.events import Answer, ChunkStatus, NoSubscriber, Outcome, Seen, StepRecord, Subscriber
from action_diffusion.deploy.loop.gate import Gate
from action_diffusion.deploy.loop.guarding import Guarding
from action_diffusion.deploy.loop.inference_worker import InferenceWorker, Unavailable
from action_diffusion.deploy.loop.operator import EVERYTHING, NoOperator, Operator, owned_of
from action_diffusion.deploy.loop.prediction import Guidance, Prediction, predict_one
from action_diffusion.deploy.robot.robots import Feedback, Observation, Robot
from action_diffusion.envs.rollout import Policy, generators
from action_diffusion.errors import InputError
from action_diffusion.policy.action_queue import ActionQueue, Request, Swap
from action_diffusion.policy.extensions.watch import LEVEL
from action_diffusion.policy.history import History


def run_episode(
    *,
    policy: Policy,
    robot: Robot,
    history: History,
    queue: ActionQueue,
    gate: Gate,
    clock: Clock,
    log: Callable[[StepRecord], None],
    seed: int,
    keys: Sequence[str],
    beside: bool = False,
    delay: int = 0,
    guidance: Guidance | None = None,
    guard: str = "warn",
    operator: Operator | None = None,
    subscriber: Subscriber | None = None,
) -> Outcome:
    """Run `policy` on `robot` until the episode is over, and hand every step to `log`.

    The policy draws its noise as in `envs.rollout` with `policy_batch=1`: on a clock that stands still while it
    thinks, an episode in a simulator equals the evaluated one. A chunk or a command that must not be executed is
    not an error: the robot holds, or goes on with the chunk that it has, the log says why, and a refused chunk is
    replaced at the next tick. The robot is stopped when this returns or raises, Ctrl-C included.

    Args:
        history: of the observations; which chunk is executed when is the queue's.
        keys: the observations that the policy wants; they are only read where it looks at them.
        beside: think in a thread, while the loop goes on.
        delay: control steps after which a chunk arrives at the earliest (>= 0).
        guard: what to do where the policy's guard finds its chunks unusual, see `guarding`.
        operator: the person who may pause the policy, command in its place, and end the episode.
        subscriber: sees everything, to record it.

    Raises:
        InputError: for observations that the robot does not have or that the policy does not take.
    """
    noise_generator, generator = generators(seed)
    think = functools.partial(
        predict_one,
        policy=policy,
        noise_generator=noise_generator,
        generator=generator,
        guidance=guidance or Guidance(),
    )
    loop = ControlLoop(
        robot=robot,
        history=history,
        queue=queue,
        worker=InferenceWorker(clock=clock, beside=beside, delay=delay),
        think=think,
        gate=gate,
        guarding=Guarding(guard),
        clock=clock,
        seed=seed,
        keys=keys,
        operator=operator or NoOperator(),
        subscriber=subscriber or NoSubscriber(),
    )
    return loop.run(log)


class _Arrival(NamedTuple):
    """What came of a chunk: seconds of thinking where it arrived, the swap, or why there was none; the guard's level
    and remark."""

    seconds: float | None
    swap: Swap | None
    refusal: str | None
    level: float | None = None
    remark: str | None = None


class ControlLoop:
    """An episode under way: the parts, and where it stands."""

    def __init__(
        self,
        *,
        robot: Robot,
        history: History,
        queue: ActionQueue,
        worker: InferenceWorker[Prediction],
        think: Callable[[Request, Mapping[str, np.ndarray]], Prediction],
        gate: Gate,
        guarding: Guarding,
        clock: Clock,
        seed: int,
        keys: Sequence[str],
        operator: Operator,
        subscriber: Subscriber,
    ) -> None:
        self._robot, self._history, self._queue, self._gate = robot, history, queue, gate
        self._guarding = guarding
        self._worker, self._think, self._clock = worker, think, clock
        self._operator, self._subscriber = operator, subscriber
        self._seed, self._keys = seed, keys
        self._asked: tuple[Request, float, float] | None = None
        self._pacer = Pacer(clock=clock, rate=robot.control_rate)
        self._start = 0.0
        self._control_step = -1
        self._steps = 0
        self._person: np.ndarray | None = None
        self._shared = False
        history.reset()
        gate.reset()
        queue.reset()

    def run(self, log: Callable[[StepRecord], None]) -> Outcome:
        """The episode from its beginning to its end, whatever that is."""
        done, score = False, None
        try:
            self._robot.begin(self._seed)
            self._subscriber.began(self._seed)
            self._operator.begin()
            while not done and self._operator.wait(self._robot.hold):
                record, done = self.step()
                if record.reward is not None:
                    score = record.reward if score is None else max(score, record.reward)
                log(record)
        finally:
            self._robot.stop()
            self._operator.end()
            self._subscriber.ended(self._seed, self._operator.mark)
            self._worker.close()
        return Outcome(self._steps, score, self._operator.mark)

    def step(self) -> tuple[StepRecord, bool]:
        """Wait for the next tick and live through it; also returns whether the episode is over."""
        tick, missed = self._pacer.wait()
        if self._steps == 0:
            self._start = tick
        self._control_step += 1 + missed
        fresh, person = self._operator.begin_step(), self._operator.commands
        self._person = self._operator.command(self._clock.now()) if person else None
        owned = self._owned() if person else None
        if fresh or self._shared != (owned is not None):
            self._forget()
        self._shared = owned is not None
        self._queue.begin_step(self._control_step)
        rests = self._guarding.rests() and not person
        if rests:
            self._queue.rest()
        arrival = self._receive()
        observation = self._observe(tick) if self._queue.will_be_seen and not rests else None
        may_ask = (self._shared or not person) and not rests and (arrival is None or arrival.refusal is None)
        if may_ask and observation is not None and self._queue.wants_chunk:
            arrival = self._ask(tick, observation.t, owned) or arrival
        sent, held, refusal, (reward, done) = self._command(person, owned, rests)
        if observation is None and self._subscriber.looks:  # after the command, so that nobody waits for it
            observation = self._robot.observe(self._keys, tick)
        swap = None if arrival is None else arrival.swap
        reasons = [None if arrival is None else arrival.remark, None if arrival is None else arrival.refusal, refusal]
        refusals = [reason for reason in reasons if reason is not None]
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
            observation_age_ms=None if observation is None else 1e3 * (tick - observation.t),
            lateness_ms=1e3 * (sent - tick),
            missed_ticks=0 if fresh else missed,
            interventions=refusals + self._robot.events(),
            operator=person,
            guard_level=None if arrival is None else arrival.level,
            guard_alarm=self._guarding.alarm,
            owned=self._operator.owned if person else 0,
            person=None if self._person is None else self._person.tolist(),
        )
        command_step = self._queue.step
        self._subscriber.stepped(record, Seen(tick, self._control_step, command_step, observation, fresh, refusals))
        self._steps += 1
        return record, done or self._steps >= self._robot.max_steps

    def _forget(self) -> None:
        """Somebody else has commanded, or nobody: what the policy saw and said before no longer counts."""
        if self._worker.forget():
            self._tell(ChunkStatus.DROPPED)
        self._history.reset()
        self._queue.reset()
        self._guarding.reset()

    def _observe(self, tick: float) -> Observation:
        """What the policy looks at."""
        observation = self._robot.observe(self._keys, tick)
        self._history.observe(observation.values)
        return observation

    def _owned(self) -> np.ndarray | None:
        """Which values of the action are the person's, bool [A]; None where all of them are."""
        number, size = self._operator.owned, len(self._gate.limits.low)
        fits = self._person is None or self._person.shape == (size,)  # the gate refuses what does not
        return owned_of(number, size) if number != EVERYTHING and fits else None

    def _ask(self, tick: float, observed: float, owned: np.ndarray | None) -> _Arrival | None:
        """Ask for a chunk. Where the loop thinks by itself, control steps may pass until it is there."""
        request, history = self._queue.request(), self._history.stacked()
        if owned is not None and self._person is not None:
            request = replace(request, owned=owned, person=self._person[None])
        self._asked = request, tick, observed
        self._worker.ask(request.step, functools.partial(self._think, request, history))
        passed = math.ceil((self._clock.now() - tick) * self._robot.control_rate - 1e-9) - 1
        self._queue.begin_step(self._control_step + max(0, passed))
        return self._receive()

    def _tell(self, status: ChunkStatus, said: Prediction | None = None, seconds: float | None = None) -> None:
        """What became of the last request."""
        assert self._asked is not None
        chunk, level = (None, None) if said is None else (said.chunk, said.notes.get(LEVEL))
        self._subscriber.answered(Answer(*self._asked, self._queue.step, status, chunk, seconds, level))

    def _receive(self) -> _Arrival | None:
        """Hand a chunk that has arrived to the queue."""
        try:
            thought = self._worker.answer(self._queue.step)
        except Unavailable as error:
            self._queue.drop()
            self._tell(ChunkStatus.UNAVAILABLE)
            return _Arrival(None, None, str(error))
        if thought is None:
            return None
        self._tell(ChunkStatus.ARRIVED, thought.answer, thought.seconds)
        remark = self._guarding.take(thought.answer.notes)
        noted = functools.partial(_Arrival, thought.seconds, level=self._guarding.level, remark=remark)
        if self._guarding.keeps_back:
            self._queue.clear()
            if self._guarding.asks:
                self._operator.ask_take_over()
            return noted(None, "guard: the robot holds, what it sees is unusual")
        try:
            swap = self._queue.receive(thought.answer.chunk)
        except InputError as error:
            return noted(None, str(error))
        late = None if swap is not None else "the chunk arrived after all of its actions were due"
        return noted(swap, late)

    def _command(self, person: bool, owned: np.ndarray | None, rests: bool) -> tuple[float, bool, str | None, Feedback]:
        """Send this step's command, or hold where there is none, the guard wants a rest, or the gate refuses it.

        person: whether a person says what it is; owned: of these values, where the policy says the others. Returns when
        that was (s), whether the robot held, why the gate refused, and what the robot answers.
        """
        lookahead = 0 if self._guarding.slows else self._robot.lookahead
        actions = [] if rests or (person and owned is None) else self._queue.plan(1 + lookahead)
        if person and self._person is None:
            actions = []
        elif self._person is not None and owned is None:
            actions = [self._person]
        elif self._person is not None and owned is not None:
            actions = [np.where(owned, self._person, action) for action in actions[:1]]
        refusal = self._gate.refuse(actions[0]) if actions else None
        sent = self._clock.now()
        if not actions or refusal is not None:
            return sent, True, refusal, self._robot.hold()
        due = self._start + self._queue.step / self._robot.control_rate
        return sent, False, None, self._robot.command([actions[0], *self._gate.ahead(actions[1:])], due)
