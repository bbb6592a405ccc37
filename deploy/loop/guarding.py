"""What a deployment does where the guard finds its chunks unusual (`policy.extensions.guard`).

    warn       says so, and goes on
    slow       every second control step rests: nothing new is commanded, and what is planned comes a step later
    hold       nothing is executed; chunks are asked for until one is usual again, or a person presses Start
    takeover   pauses, and asks for a person: Take over, or Start

When an alarm begins and ends, `guard.Watch` says.
"""

from __future__ import annotations

from collections.abc import Mapping

from action_diffusion.policy.extensions.watch import LEVEL, Watch


class Guarding:
    """One episode's. action: one of the above.

    Attributes:
        level: how near an alarm is, as of the newest chunk: above 1 there is one. None where nobody guards.
    """

    def __init__(self, action: str = "warn") -> None:
        self._action, self._watch = action, Watch()
        self.reset()

    def reset(self) -> None:
        """What was before no longer counts."""
        self._watch.reset()
        self.level: float | None = None
        self._rested = False

    @property
    def alarm(self) -> bool:
        """Whether there is one."""
        return self._watch.alarm

    def take(self, notes: Mapping[str, float]) -> str | None:
        """The notes of a chunk that has arrived. Returns what there is to say of an alarm that begins."""
        if LEVEL not in notes:
            return None
        before, now = self.alarm, self._watch.take(notes[LEVEL])
        self.level = self._watch.sum
        return f"guard: unusual, level {self.level:.2f}: {self._action}" if now and not before else None

    @property
    def keeps_back(self) -> bool:
        """Whether nothing is to be executed now."""
        return self.alarm and self._action in ("hold", "takeover")

    @property
    def asks(self) -> bool:
        """Whether a person is to take over."""
        return self.alarm and self._action == "takeover"

    @property
    def slows(self) -> bool:
        """Whether an alarm slows the arm down: it is told of one command at a time, so that it rests where it is."""
        return self.alarm and self._action == "slow"

    def rests(self) -> bool:
        """Whether the control step that begins is one of rest: every second one, where it `slows`."""
        self._rested = self.slows and not self._rested
        return self._rested
