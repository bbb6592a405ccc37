"""The loop's safety gate: each command, within what was demonstrated, before it is sent.

A diffusion policy can return anything: NaN after it has diverged, a chunk from another mode, a target outside the
workspace. The gate knows nothing of policies. It compares what it is given with limits, and with what passed before,
and says why it refuses; the robot then holds what it had. The arm's process trusts nobody: it has a gate of its own,
`arm.gate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from action_diffusion.deploy.hardware.limits import Limits, outside
from action_diffusion.errors import InputError
from action_diffusion.policy.spec import CONSTANT


def demonstrated(statistics: Mapping[str, Any], margin: float) -> Limits:
    """The range of the demonstrated actions, widened at both ends by `margin`, a share of it (>= 0).

    `statistics`: of the action, from the bundle (`policy.normalizer.fit`). A dimension that never changed in the
    demonstrations may leave its value by `margin`, in its unit.
    """
    if not 0 <= margin < np.inf:
        raise InputError(f"safety.margin={margin} must be 0 or more, and finite")
    if "min" not in statistics or "max" not in statistics:
        raise InputError("the bundle does not say in which range its actions were demonstrated, so none can be checked")
    low, high = (np.asarray(statistics[end], dtype=np.float64) for end in ("min", "max"))
    span = high - low
    constant = span <= CONSTANT * np.maximum(1.0, np.abs(high))
    room = margin * np.where(constant, 1.0, span)
    return Limits(low=low - room, high=high + room)


class Gate:
    """Passes commands that are finite, of the right shape and inside `limits`; remembers the last one that passed."""

    def __init__(self, *, limits: Limits) -> None:
        self.limits = limits
        self.last: np.ndarray | None = None

    def reset(self) -> None:
        """A new episode begins: no command has passed, and any step to the first one is allowed."""
        self.last = None

    def refuse(self, command: np.ndarray) -> str | None:
        """Why `command` must not be sent, in one line; None where it may be, and then counts as sent."""
        reason = self._reason(np.asarray(command))
        if reason is None:
            self.last = np.array(command)
        return reason

    def ahead(self, commands: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Those of `commands` [A] each, from the first on, that could follow the last one that passed; none counts."""
        last, passed = self.last, []
        for command in commands:
            if self.refuse(command) is not None:
                break
            passed.append(command)
        self.last = last
        return passed

    def _reason(self, command: np.ndarray) -> str | None:
        limits = self.limits
        if command.shape != limits.low.shape:
            return f"the command has shape {list(command.shape)}, expected {list(limits.low.shape)}"
        if not np.isfinite(command).all():
            return f"the command is not finite: {command.tolist()}"
        beyond = outside("command", command, limits)
        if beyond is not None:
            return beyond
        if limits.max_step is not None and self.last is not None:
            step = np.abs(command - self.last)
            if (step > limits.max_step).any():
                i = int((step > limits.max_step).argmax())
                return f"command[{i}] is {step[i]:g} away from the last one, at most {limits.max_step[i]:g} is allowed"
        return None
