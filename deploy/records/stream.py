"""Everything that a run was made of, for a record on disk and for the page, without a wait for either.

    loop ─▶ rings `seen`, `steps`, `chunks`, `marks` ─┬▶ recorder's process ─▶ DIR/record.zarr
    arm's process ─▶ rings `setpoints`, `events` ─────┴▶ page's process

The loop copies what it has into shared memory, and that is all. A recorder that is slow, halted or dead delays
nothing; what it did not get to in time is missing in the record, which says how many steps that are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from action_diffusion.deploy.ipc.processes import Child
from action_diffusion.deploy.ipc.rings import Fields, RingWriter
from action_diffusion.deploy.loop.events import Answer, Seen, StepRecord
from action_diffusion.files import atomic_path
from action_diffusion.policy.spec import PolicySpec

RECORD = "record.zarr"
NO_NUMBER = float("nan")
MARKS = (None, "success", "failure", "partial", "redo")
_SEEN_BYTES, _MOST_SLOTS, _LEAST_SLOTS = 32 << 20, 128, 8
TEXT = 480
STEPS: Fields = {
    **dict.fromkeys(("sent", "reward", "inference_ms", "jump", "observation_age_ms", "lateness_ms"), ("f8", ())),
    "guard_level": ("f8", ()),
    **dict.fromkeys(("seed", "step", "control_step", "command_step", "delay", "missed_ticks", "owned"), ("i8", ())),
    **dict.fromkeys(("commanded", "held", "operator", "fresh", "guard_alarm"), ("?", ())),
    "interventions": (f"S{TEXT}", ()),
    "refusals": (f"S{TEXT}", ()),
}
"""Of the ring `steps`, beside `action`, and `person`, what one said. Where there was no number: NaN, a delay −1."""
CHUNKS: Fields = {
    **dict.fromkeys(("asked", "observed", "seconds", "noted_level"), ("f8", ())),
    **dict.fromkeys(("seed", "requested_step", "known_step", "delay", "n_running"), ("i8", ())),
    "status": ("i4", ()),
}
"""Of the ring `chunks`, beside `chunk` and `running`."""
EPISODES: Fields = {"seed": ("i8", ()), "begins": ("?", ()), "mark": ("i4", ())}


def seen_fields(spec: PolicySpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of the ring `seen`: the policy's observations."""
    return {key: (np.dtype(value.dtype).str, tuple(value.shape)) for key, value in spec.observations.items()}


class RunStream:
    """See `events.Subscriber`. Nothing is on disk before the first step.

    Args:
        folder: the run's shared memory, in which the rings are made.
        spec: of the policy.
        output: where the record goes, or None for rings alone.
        attrs: plain values that the record keeps, for `replay`.
        say: takes a line where there is no record (any more).

    Raises:
        InputError: for an `output` that is there already.
    """

    looks = True

    def __init__(
        self,
        folder: Path,
        spec: PolicySpec,
        *,
        output: Path | None,
        attrs: Mapping[str, object],
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        self._later = folder / "record_attrs.json"
        (size,), horizon, seen = spec.action.shape, spec.horizon, seen_fields(spec)
        n_bytes = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in seen.values())
        n_slots = int(np.clip(_SEEN_BYTES // n_bytes, _LEAST_SLOTS, _MOST_SLOTS))
        block, vector = ("f8", (horizon, size)), ("f8", (size,))
        self._seen = RingWriter(folder / "seen", fields=seen, n_slots=n_slots)
        self._steps = RingWriter(folder / "steps", fields={**STEPS, "action": vector, "person": vector}, n_slots=256)
        self._chunks = RingWriter(folder / "chunks", fields={**CHUNKS, "chunk": block, "running": block}, n_slots=32)
        self._episodes = RingWriter(folder / "episodes", fields=EPISODES, n_slots=32)
        self._block, self._size, self._seed, self._say = block[1], size, 0, say
        self._recorder: Child | None = None
        if output is not None:
            arguments = {"output": str(output), "attrs": dict(attrs), "later": str(self._later)}
            self._recorder = Child("action_diffusion.deploy.records.recorder", folder, "recorder", arguments)
            self._recorder.wait_ready()

    def began(self, seed: int) -> None:
        self._seed = seed
        self._episodes.append(time.monotonic(), {"seed": seed, "begins": True, "mark": 0})

    def ended(self, seed: int, mark: str | None) -> None:
        self._episodes.append(time.monotonic(), {"seed": seed, "begins": False, "mark": MARKS.index(mark)})

    def answered(self, answer: Answer) -> None:
        request = answer.request
        rest = request.running
        values = {
            "asked": answer.asked,
            "observed": answer.observed,
            "seconds": _number(answer.seconds),
            "noted_level": _number(answer.noted_level),
            "seed": self._seed,
            "requested_step": request.step,
            "known_step": answer.step,
            "delay": request.delay,
            "n_running": -1 if rest is None else len(rest),
            "status": int(answer.status),
            "chunk": self._filled(answer.chunk),
            "running": self._filled(rest),
        }
        self._chunks.append(time.monotonic(), values)

    def _filled(self, rows: np.ndarray | None) -> np.ndarray:
        """[H, A]: `rows`, and NaN where there are none, or where they are too many or too long."""
        block = np.full(self._block, np.nan)
        if rows is not None and rows.ndim == 2 and len(rows) <= len(block) and rows.shape[1] == self._size:
            block[: len(rows)] = rows
        return block

    def _vector(self, values: list[float] | None) -> list[float]:
        """`values`, or NaN where there are none, or not as many as an action has: the gate refuses those."""
        return values if values is not None and len(values) == self._size else [NO_NUMBER] * self._size

    def stepped(self, record: StepRecord, seen: Seen) -> None:
        assert seen.observation is not None
        self._seen.append(seen.observation.t, seen.observation.values)
        values = {
            "sent": seen.tick + record.lateness_ms / 1e3,
            "reward": _number(record.reward),
            "inference_ms": _number(record.inference_ms),
            "jump": _number(record.jump),
            "observation_age_ms": _number(record.observation_age_ms),
            "lateness_ms": record.lateness_ms,
            "seed": record.seed,
            "step": record.step,
            "control_step": seen.control_step,
            "command_step": seen.command_step,
            "delay": -1 if record.delay is None else record.delay,
            "missed_ticks": record.missed_ticks,
            "commanded": record.action is not None,
            "held": record.held,
            "operator": record.operator,
            "owned": record.owned,
            "person": self._vector(record.person),
            "fresh": seen.fresh,
            "guard_level": _number(record.guard_level),
            "guard_alarm": record.guard_alarm,
            "interventions": _text(record.interventions),
            "refusals": _text(seen.refusals),
            "action": np.zeros(self._size) if record.action is None else record.action,
        }
        self._steps.append(seen.tick, values)
        if self._recorder is not None and not self._recorder.alive:
            self._recorder = None
            self._say("the recorder's process has died: from now on there is no record but the log")

    def close(self, attrs: Mapping[str, object] | None = None) -> None:
        """The run is over: wait until all of it is on disk. attrs: plain values of the record that are known now."""
        if self._recorder is not None:
            try:
                if attrs:
                    with atomic_path(self._later) as partial:
                        partial.write_text(json.dumps(attrs), encoding="utf-8")
            finally:
                self._recorder.end(30.0)


def _number(value: float | None) -> float:
    return NO_NUMBER if value is None else float(value)


def _text(lines: Iterable[str]) -> bytes:
    return "\n".join(lines).encode("utf-8")[:TEXT]
