"""A recorded run once more, offline: the same loop, queue and gate, on a clock that does what the real one did.

    record: observations, and when each chunk was there ─▶ `ControlLoop` ─▶ commands ─▶ equal to the recorded ones?
    chunks: those of the record, or, where the bundle is given, the policy's own, from the same observations and noise

The same inputs give the same commands, bit for bit on the same machine. With another scheduling or guidance the
commands are those that *would have been* sent from what the robot saw, which then would have seen something else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.loop.clock import VirtualClock
from action_diffusion.deploy.loop.episode import ControlLoop
from action_diffusion.deploy.loop.events import ChunkStatus, NoSubscriber, StepRecord
from action_diffusion.deploy.loop.gate import Gate
from action_diffusion.deploy.loop.guarding import Guarding
from action_diffusion.deploy.loop.inference_worker import InferenceWorker, Thought, Unavailable
from action_diffusion.deploy.loop.operator import EVERYTHING, NoOperator
from action_diffusion.deploy.loop.prediction import Guidance, Prediction, predict_one
from action_diffusion.deploy.records.reader import Recorded, read_limits
from action_diffusion.deploy.robot.robots import Feedback, Observation
from action_diffusion.envs.rollout import Policy, generators
from action_diffusion.errors import InputError
from action_diffusion.policy.action_queue import ActionQueue, Request
from action_diffusion.policy.extensions.watch import LEVEL
from action_diffusion.policy.history import History


class ReplayRobot:
    """Shows what was seen, and takes commands without a consequence."""

    limits: Limits | None = None
    processes = None

    def __init__(self, recorded: Recorded, clock: VirtualClock, *, control_rate: float, lookahead: int) -> None:
        self._recorded, self._clock = recorded, clock
        self.control_rate, self.lookahead, self.max_steps = control_rate, lookahead, len(recorded.steps["step"])
        self._row = 0

    def at(self, name: str) -> Any:
        """A value of the present step."""
        return self._recorded.steps[name][self._row].item()

    def owned(self) -> int:
        """What of it was a person's; all, in records of when nothing was shared."""
        return int(self.at("owned")) if "owned" in self._recorded.steps else EVERYTHING

    def shown(self) -> np.ndarray | None:
        """What the person said in this step, [A]; in old records, what of it was commanded."""
        if "person" in self._recorded.steps:
            said = self._recorded.steps["person"][self._row]
            return None if np.isnan(said).any() else said
        return None if self.at("held") else self._recorded.seen["action"][self._row]

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        return Observation(t, {key: self._recorded.seen[key][self._row] for key in keys})

    def command(self, actions: Sequence[np.ndarray], t: float) -> Feedback:
        return self.hold()

    def hold(self) -> Feedback:
        """The next tick is the one that was next then."""
        reward = self.at("reward")
        self._row = min(self._row + 1, self.max_steps - 1)
        self._clock.sleep_until((self.at("control_step") - 0.5) / self.control_rate)
        return None if np.isnan(reward) else float(reward), False

    def think(self) -> None:
        """The loop was busy with a chunk until the tick for which it then commanded."""
        passed = self.at("command_step") - self.at("control_step")
        if passed:
            self._clock.advance((passed + 0.5) / self.control_rate)

    def begin(self, seed: int) -> None:
        pass

    def events(self) -> list[str]:
        return []

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class ReplayOperator(NoOperator):
    """The person of then. See `operator.Operator`."""

    def __init__(self, robot: ReplayRobot) -> None:
        self._robot = robot

    @property
    def commands(self) -> bool:  # type: ignore[override]
        return bool(self._robot.at("operator"))

    @property
    def owned(self) -> int:  # type: ignore[override]
        return self._robot.owned()

    def begin_step(self) -> bool:
        return bool(self._robot.at("fresh"))

    def command(self, t: float) -> np.ndarray | None:
        return self._robot.shown()


class ReplayWorker(InferenceWorker[Prediction]):
    """Answers when the recorded run had its answers: with those, or with what the policy says.

    A request that was not made then, under another scheduling, takes as long as the one before it.
    """

    def __init__(
        self, recorded: Recorded, robot: ReplayRobot, clock: VirtualClock, *, thinks: bool, other: bool
    ) -> None:
        super().__init__(clock=clock)
        self._recorded, self._robot, self._thinks, self._other = recorded, robot, thinks, other
        self._delay, self._status, self._said = 0, ChunkStatus.ARRIVED, Prediction(np.zeros(0), {})
        self._asked = False

    def ask(self, step: int, work: Callable[[], Prediction]) -> None:
        row, chunks = self._recorded.answers.get(step), self._recorded.chunks
        self._asked, self._status = True, ChunkStatus.ARRIVED
        if row is not None:
            self._robot.think()
            self._delay = int(chunks["known_step"][row]) - step
            self._status = ChunkStatus(int(chunks["status"][row]))
        elif not self._other:
            self._status = ChunkStatus.DROPPED  # the episode was over before it came
        elif not self._thinks:
            raise InputError(f"control step {step}: no chunk was recorded for it; give bundle=, to have one predicted")
        if self._thinks:
            self._said = work()
        elif row is not None:
            self._said = Prediction(_narrow(chunks["chunk"][row]), {})
        if row is not None and "noted_level" in chunks and np.isfinite(chunks["noted_level"][row]):
            self._said = self._said._replace(notes={LEVEL: float(chunks["noted_level"][row])})
        self._due = step + self._delay

    def answer(self, step: int) -> Thought[Prediction] | None:
        if not self._asked or step < self._due or self._status is ChunkStatus.DROPPED:
            return None
        self._asked = False
        if self._status is ChunkStatus.UNAVAILABLE:
            raise Unavailable("nobody was there to answer")
        return Thought(self._said, 0.0)

    def forget(self) -> bool:
        asked, self._asked = self._asked, False
        return asked


def _narrow(chunk: np.ndarray) -> np.ndarray:
    """In the type that policies predict in, where nothing is lost by that."""
    narrow = chunk.astype(np.float32)
    return narrow if np.array_equal(narrow, chunk, equal_nan=True) else chunk


@dataclass(frozen=True)
class Replayed:
    """An episode as it would have been commanded, beside what was.

    Attributes:
        commands, before: [T, A] in the data's units, NaN where the robot held.
        records: of the loop.
    """

    recorded: Recorded
    commands: np.ndarray
    before: np.ndarray
    records: Sequence[StepRecord]

    @property
    def differing(self) -> np.ndarray:
        """The steps whose command is not, bit for bit, the recorded one."""
        same = (self.commands == self.before) | (np.isnan(self.commands) & np.isnan(self.before))
        return np.flatnonzero(~same.all(axis=1))

    @property
    def distance(self) -> float:
        """The largest between two commands of one step, in the data's units."""
        away = np.linalg.norm(self.commands - self.before, axis=1)
        return float(np.nanmax(away)) if np.isfinite(away).any() else 0.0


def replay(
    recorded: Recorded,
    *,
    attrs: Mapping[str, Any],
    queue: ActionQueue,
    guidance: Guidance,
    policy: Policy | None = None,
    other: bool = False,
) -> Replayed:
    """The episode once more, with the recorded chunks, or those of `policy`.

    `queue`: the same for all episodes of a run, since it remembers how long chunks took. `other`: it, or the
    guidance, is not as it was. Raises `InputError` where a chunk is asked for that was not recorded.
    """
    clock = VirtualClock()
    robot = ReplayRobot(recorded, clock, control_rate=attrs["control_rate"], lookahead=attrs["lookahead"])
    noise_generator, generator = generators(recorded.seed)

    def think(request: Request, history: Mapping[str, np.ndarray]) -> Prediction:
        assert policy is not None
        noise = {"noise_generator": noise_generator, "generator": generator}
        return predict_one(request, history, policy=policy, guidance=guidance, **noise)

    episode = ControlLoop(
        robot=robot,
        history=History(attrs["n_obs_steps"]),
        queue=queue,
        worker=ReplayWorker(recorded, robot, clock, thinks=policy is not None, other=other),
        think=_keeping(think, generator, recorded),
        gate=Gate(limits=read_limits(attrs["limits"])),
        guarding=Guarding(attrs["config"].get("guard", {}).get("action", "warn")),
        clock=clock,
        seed=recorded.seed,
        keys=[key for key in recorded.seen if key != "action"],
        operator=ReplayOperator(robot),
        subscriber=NoSubscriber(),
    )
    records = [episode.step()[0] for _ in range(robot.max_steps)]
    action, held = recorded.seen["action"], recorded.steps["held"]
    commands = [np.full(action.shape[1], np.nan) if record.held else record.action for record in records]
    return Replayed(recorded, np.array(commands, np.float64), np.where(held[:, None], np.nan, action), records)


def _keeping(
    think: Callable[..., Prediction], generator: torch.Generator, recorded: Recorded
) -> Callable[..., Prediction]:
    """Where nobody answered, no noise of the steps was drawn either."""

    @functools.wraps(think)
    def kept(request: Request, history: Mapping[str, np.ndarray]) -> Prediction:
        row, state = recorded.answers.get(request.step), generator.get_state()
        said = think(request, history)
        if row is not None and recorded.chunks["status"][row] == ChunkStatus.UNAVAILABLE:
            generator.set_state(state)
        return said

    return kept
