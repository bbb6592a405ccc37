"""The loop of a session: at every tick of the control rate it listens, drives, records, and tells how it stands.

              start              countdown is over            keep: committed
    READY ───────────▶ COUNTDOWN ───────────▶ RECORDING ─┬─ discard: gone, the same start again ─▶ READY
      ▲ │                   │ discard             │      └─ task done, or too long ─▶ OVER ─ keep, discard ─▶ READY
      │ └─ undo: the last kept one is gone        │
      └─────────────────────┘                     └─ nobody drives, or the gate refuses: paused, not a row is recorded

Episode i begins at start `seed` + i, i being how many are kept: no start is left out because it was hard. A row is
recorded when its action has passed the gate and was executed; the first is the first that the person drives.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol, TypedDict

import numpy as np

from action_diffusion.deploy.loop.clock import Clock, Pacer
from action_diffusion.deploy.loop.gate import Gate
from action_diffusion.deploy.teleop.devices.device import Ask, Device, Signals
from action_diffusion.deploy.teleop.steering import SignalMapping
from action_diffusion.deploy.teleop.world import World
from action_diffusion.errors import InputError

MOST_LATENESSES = 1_000_000


class EpisodeMode(enum.IntEnum):
    """Where an episode stands."""

    READY, COUNTDOWN, RECORDING, OVER = 0, 1, 2, 3


class Status(TypedDict):
    """How a session stands, in plain values; None: there is none.

    countdown: s until the recording begins. driven: somebody drives. score: the best reward of this episode so far.
    target: where the arm is to go. wanted: episodes, in all. missed: ticks.
    """

    mode: str
    countdown: float | None
    step: int
    driven: bool
    score: float | None
    target: list[float] | None
    message: str
    episodes: int
    wanted: int
    mean_score: float | None
    discarded: int
    missed: int
    ticks: int


class Sink(Protocol):
    """Where episodes go: `datasets.recorder.RunRecorder`."""

    @property
    def n_episodes(self) -> int: ...
    @property
    def n_steps(self) -> int: ...

    def add(self, step: Mapping[str, np.ndarray | np.float32]) -> None: ...
    def keep(self) -> int: ...
    def discard(self) -> None: ...
    def undo(self) -> int: ...


class TeleopSession:
    """See the module. `run` returns when the person finishes; whatever is kept by then is on disk.

    Args:
        world, device, steering, gate: the parts.
        sink: takes steps and episodes.
        seed: of the first episode of the buffer.
        countdown: seconds between a start and the first step.
        max_steps: after which an episode is over.
        wanted: how many episodes somebody wants, for the page.
        clock: of the loop.
        tell: takes what the page shows, after every tick: see `status`.
    """

    def __init__(
        self,
        *,
        world: World,
        device: Device,
        steering: SignalMapping,
        gate: Gate,
        sink: Sink,
        clock: Clock,
        seed: int = 0,
        countdown: float = 3.0,
        max_steps: int = 1200,
        wanted: int = 0,
        tell: Callable[[Status], None] = lambda status: None,
    ) -> None:
        self._world, self._device, self._steering, self._gate, self._sink = world, device, steering, gate, sink
        self._clock, self._seed, self._countdown, self._wanted, self._tell = clock, seed, countdown, wanted, tell
        self._begins, self._max_steps = 0.0, max_steps
        self.scores: list[float | None] = []
        self.discarded = self.undone = self.missed = self.refused = self.ticks = 0
        self.lateness: deque[float] = deque(maxlen=MOST_LATENESSES)
        self._finished = False
        self._say("")
        left = sink.n_steps
        self._prepare()
        if left:
            self.mode = EpisodeMode.OVER
            self._say(f"an earlier session was interrupted, and left an episode of {left} steps: keep or discard it")

    def run(self) -> None:
        """Go on until somebody finishes."""
        pacer = Pacer(clock=self._clock, rate=self._world.control_rate)
        try:
            while not self._finished:
                tick, missed = pacer.wait()
                self.lateness.append(self._clock.now() - tick)
                self.missed += missed
                self.ticks += 1
                self._tick(tick)
        finally:
            self._world.stop()

    def _tick(self, tick: float) -> None:
        signals = self._device.poll()
        for order in signals.orders:
            self._obey(order)
        if self.mode is EpisodeMode.COUNTDOWN and self._clock.now() >= self._begins:
            self._become(EpisodeMode.RECORDING)
            self._say("")
        if self.mode is EpisodeMode.RECORDING or (self.mode is EpisodeMode.COUNTDOWN and not self._world.waits):
            self._drive(signals, tick)
        for reason in self._world.events():
            self._say(reason)
        self._tell(self.status())

    def _become(self, mode: EpisodeMode) -> None:
        self.mode = mode

    def _say(self, line: str) -> None:
        self.message = line

    def _prepare(self) -> None:
        """The next episode: its start is shown, and nothing moves."""
        self._become(EpisodeMode.READY)
        self._world.prepare(self._seed + self._sink.n_episodes)
        self._gate.reset()
        self._steering.reset()
        self._driven, self._steps = False, 0
        self._best: float | None = None
        self._target: np.ndarray | None = None

    def _obey(self, order: Ask) -> None:
        """An order that makes no sense now is left alone: a button that is pressed twice keeps one episode."""
        if order is Ask.FINISH:
            self._finished = True
        elif order is Ask.START and self.mode is EpisodeMode.READY:
            self._start()
        elif order is Ask.KEEP and self.mode in (EpisodeMode.RECORDING, EpisodeMode.OVER):
            self._keep()
        elif order is Ask.DISCARD and self.mode is not EpisodeMode.READY:
            self._discard()
        elif order is Ask.UNDO and self.mode is EpisodeMode.READY:
            self._undo()

    def _start(self) -> None:
        """A robot may not be ready: after an emergency stop, for one."""
        try:
            self._world.begin()
        except InputError as error:
            self._say(str(error))
            return
        self._begins = self._clock.now() + self._countdown
        self._become(EpisodeMode.COUNTDOWN)
        self._say("")

    def _keep(self) -> None:
        if not self._sink.n_steps:
            self._discard()
            self._say("nobody has driven yet: there is nothing to keep")
            return
        self._world.stop()
        self._sink.keep()
        self.scores.append(self._best)
        self._prepare()
        self._say(f"kept episode {self._sink.n_episodes}")

    def _discard(self) -> None:
        self._world.stop()
        self.discarded += self._sink.n_steps > 0
        self._sink.discard()
        self._prepare()
        self._say("discarded: the same start again")

    def _undo(self) -> None:
        if not self._sink.n_episodes:
            self._say("there is no episode to take back")
            return
        left = self._sink.undo()
        self.undone += 1
        if self.scores:
            self.scores.pop()
        self._prepare()
        self._say(f"took back episode {left + 1}")

    def _drive(self, signals: Signals, tick: float) -> None:
        """One control step of the episode, or none where nobody drives."""
        why = self._step(signals, tick)
        self._driven = why is None
        if why is None:
            return
        self._say(why)
        if self._world.hold():
            self._over("the robot has stopped: what was recorded so far can be kept")

    def _step(self, signals: Signals, tick: float) -> str | None:
        """Drive and record; otherwise why not."""
        if not signals.engaged:
            return signals.why
        if not self._steps and signals.target is None and not (signals.toggle or np.any(signals.twist)):
            return "move, and the recording begins"
        present = self._world.present()
        if not self._driven:
            self._steering.begin(present)
            self._world.resume(present)
        observation = self._world.observe()
        steered = self._steering.action(signals, present)
        if isinstance(steered, str):
            return steered
        action = steered.astype(np.float32)
        refusal = self._gate.refuse(action)
        if refusal is not None:
            self.refused += 1
            return refusal
        self._target = action
        self._say("")
        executed, (reward, done) = self._world.step(action, tick)
        if self.mode is EpisodeMode.RECORDING:
            self._record(observation, executed, reward)
            if done:
                self._over("the task is done: keep it?" if reward == 1.0 else "it is over: keep or discard it")
            elif self._steps >= self._max_steps:
                self._over(f"{self._max_steps} steps are the most: keep or discard it")
        return None

    def _record(self, observation: dict[str, np.ndarray], action: np.ndarray, reward: float | None) -> None:
        step: dict[str, np.ndarray | np.float32] = {**observation, "action": action}
        if reward is not None:
            step["reward"] = np.float32(reward)
            self._best = reward if self._best is None else max(self._best, reward)
        self._sink.add(step)
        self._steps += 1

    def _over(self, why: str) -> None:
        self._world.stop()
        self._become(EpisodeMode.OVER)
        self._say(why)

    def status(self) -> Status:
        """What the page shows."""
        left = max(0.0, self._begins - self._clock.now()) if self.mode is EpisodeMode.COUNTDOWN else None
        scores = [score for score in self.scores if score is not None]
        return {
            "mode": self.mode.name,
            "countdown": left,
            "step": self._steps,
            "driven": self._driven,
            "score": self._best,
            "target": None if self._target is None else self._target.tolist(),
            "message": self.message,
            "episodes": self._sink.n_episodes,
            "wanted": self._wanted,
            "mean_score": float(np.mean(scores)) if scores else None,
            "discarded": self.discarded,
            "missed": self.missed,
            "ticks": self.ticks,
        }

    def summary(self) -> dict[str, object]:
        """What the command prints."""
        late = 1e3 * np.array(self.lateness or [0.0])
        scores = [score for score in self.scores if score is not None]
        return {
            "episodes": self._sink.n_episodes,
            "kept_now": len(self.scores),
            "mean_score": round(float(np.mean(scores)), 4) if scores else None,
            "discarded": self.discarded,
            "undone": self.undone,
            "refused_by_the_gate": self.refused,
            "missed_ticks": f"{self.missed} of {self.ticks + self.missed}",
            "tick_lateness_ms": "median {:.1f}, 99 % {:.1f}, max {:.1f}".format(*np.percentile(late, [50, 99, 100])),
        }
