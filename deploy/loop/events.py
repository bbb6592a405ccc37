"""What happened in a run, step by step: what the loop says to its log, and to whoever else wants to know.

request ─▶ Answer (arrived, refused, nobody there, no longer wanted)        `Subscriber.answered`
tick    ─▶ Seen, StepRecord                                                 `Subscriber.stepped`
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from action_diffusion.deploy.robot.robots import Observation
from action_diffusion.policy.action_queue import Request

ENDINGS = ("stop: ", "broken: ", "the arm's process")
"""How the reasons begin for which a robot ends an episode by itself."""


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
        operator: a person commanded, not the policy.
        guard_level: how near an alarm is, above 1 there is one; None where no chunk arrived, or nobody guards.
        guard_alarm: whether there is one (`guarding.Guarding`).
        owned: which values of the action were the person's, see `operator.bits`; the policy said the others.
        person: what the person said, [A]; None where nobody did.
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
    operator: bool = False
    guard_level: float | None = None
    guard_alarm: bool = False
    owned: int = 0
    person: list[float] | None = None


def endings(step: StepRecord) -> list[str]:
    """Why the robot ended the episode by itself in this step; nothing where it did not."""
    return [reason for reason in step.interventions if reason.startswith(ENDINGS)]


class Outcome(NamedTuple):
    """How an episode ended: after how many steps, its largest reward, where something measured one, and what a person
    said of it: "success", "failure", or nothing."""

    steps: int
    score: float | None
    mark: str | None = None


class ChunkStatus(enum.IntEnum):
    """What became of a request: its chunk arrived, nobody was there to answer, or it was no longer wanted."""

    ARRIVED, UNAVAILABLE, DROPPED = 0, 1, 2


class Answer(NamedTuple):
    """What became of a request for a chunk, asked at `asked` (s) from an observation of `observed` (s).

    step: the control step in which that was known. chunk: [H, A] in the data's units, where one arrived.
    noted_level: what a guard says of it (`guard.LEVEL`).
    """

    request: Request
    asked: float
    observed: float
    step: int
    status: ChunkStatus
    chunk: np.ndarray | None = None
    seconds: float | None = None
    noted_level: float | None = None


class Seen(NamedTuple):
    """What a control step was made of, beside its `StepRecord`.

    Attributes:
        tick: when it began (s).
        control_step: its number on the grid of ticks, which counts those that were missed.
        command_step: the control step that its command was for: a later one where thinking took that long.
        observation: None where nobody looked.
        fresh: nobody, or somebody else, had commanded before: the policy began anew.
        refusals: why the loop kept a command from the robot, or took no chunk.
    """

    tick: float
    control_step: int
    command_step: int
    observation: Observation | None
    fresh: bool
    refusals: Sequence[str]


class Subscriber(Protocol):
    """Whoever wants to see everything. Returns at once, whatever is asked of it.

    Attributes:
        looks: whether every step is to be observed, also where the policy does not look.
    """

    looks: bool

    def began(self, seed: int) -> None:
        """An episode begins."""

    def answered(self, answer: Answer) -> None:
        """Something became of a request."""

    def stepped(self, record: StepRecord, seen: Seen) -> None:
        """A step is over."""

    def ended(self, seed: int, mark: str | None) -> None:
        """The episode is over, however it ended; `mark`: what a person said of it."""


class NoSubscriber:
    """Nobody is there to see it."""

    looks = False

    def began(self, seed: int) -> None:
        pass

    def answered(self, answer: Answer) -> None:
        pass

    def stepped(self, record: StepRecord, seen: Seen) -> None:
        pass

    def ended(self, seed: int, mark: str | None) -> None:
        pass
