"""What the page shows: a run's rings as plain values, read from another process, in nobody's way."""

from __future__ import annotations

import io
import math
import re
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from action_diffusion.datasets.images.pictures import preview
from action_diffusion.deploy.ipc.channels import Phase, text
from action_diffusion.deploy.ipc.processes import SILENCE
from action_diffusion.deploy.ipc.rings import Moment, Record, RingReader
from action_diffusion.deploy.loop.operator import Mode, owned_of
from action_diffusion.deploy.page import trial

if TYPE_CHECKING:
    from action_diffusion.deploy.robot.process_robot import Plane

TRAIL, WINDOW, EVENTS = 100, 200, 30
"""Commands that are shown behind the present one; steps that the timings are of; kinds of events."""
SLOW = 0.05
"""Missed deadlines, as a share of steps, from which on the page says what helps."""
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


class AboutRun(TypedDict):
    """What does not change in a run. dimensions, units, low, high: of each number of a command; teleop: the device.
    parts: the numbers, one or those of a rotation, that may be a person's while the policy has the others; none where
    nothing can be shared. trials: the page says nothing by which policies could be told apart, and takes marks."""

    task: str
    control_rate: float
    n_obs_steps: int
    cameras: list[str]
    dimensions: list[str]
    units: list[str]
    low: list[float]
    high: list[float]
    plane: Plane | None
    teleop: str | None
    parts: list[list[int]]
    trials: bool


BLIND = ("guard", "timing", "chunk", "advice")
"""Of the state, what would tell policies apart that are compared: how long each thinks, and how far ahead."""


class RunView:
    """Reads the rings in `folder`."""

    def __init__(self, folder: Path, about: AboutRun) -> None:
        self._folder, self._about = folder, about
        self._rings: dict[str, RingReader] = {}
        self._heard: dict[str, int] = {}
        self._loop, self._emergency = Moment(folder / "loop.beat"), Moment(folder / "emergency")
        self._trail: deque[list[float]] = deque(maxlen=TRAIL)
        self._recent: deque[Record] = deque(maxlen=WINDOW)
        self._events: dict[str, tuple[float, str, int]] = {}
        self._totals = {"steps": 0, "missed": 0, "held": 0, "interventions": 0}
        self._chunk: Record | None = None
        self._encoded: dict[str, tuple[int, bytes]] = {}

    def _ring(self, name: str) -> RingReader | None:
        """None where there is no such ring yet."""
        if name not in self._rings and (self._folder / name).exists():
            self._rings[name] = RingReader(self._folder / name)
        return self._rings.get(name)

    def _latest(self, name: str) -> Record | None:
        ring = self._ring(name)
        return None if ring is None else ring.latest()

    def _new(self, name: str) -> list[Record]:
        ring = self._ring(name)
        records = [] if ring is None else ring.after(self._heard.get(name, -1))
        if records:
            self._heard[name] = records[-1].number
        return records

    def state(self) -> dict[str, object]:
        """Everything that changes, as JSON has it; numbers that there are none of are None."""
        now = time.monotonic()
        self.look()
        setpoint, mode = self._latest("setpoints"), self._latest("modes")
        phase = Phase.STILL if setpoint is None else Phase(int(setpoint.values["phase"]))
        silent = setpoint is None or now - setpoint.t > 2 * SILENCE
        state: dict[str, object] = {
            "mode": Mode.OVER.name if mode is None else Mode(int(mode.values["mode"])).name,
            "owned": self._owned(mode),
            "phase": "SILENT" if silent else phase.name,
            "emergency": self._emergency.t > 0,
            "loop": now - self._loop.t < 2 * SILENCE,
            "setpoint": None if setpoint is None else setpoint.values["command"].tolist(),
            "step": self._step(),
            "guard": self._guard(),
            "timing": self._timing(),
            "totals": self._totals,
            "trail": list(self._trail),
            "chunk": self._future(),
            "scene": self._scene(),
            "advice": self._advice(),
            "events": [
                {"age": round(now - t, 1), "text": line, "times": times}
                for t, line, times in reversed(self._events.values())
            ],
        }
        if self._about["trials"]:
            state |= dict.fromkeys(BLIND)
            state["trial"] = trial.shown(self._folder)
        return state

    def start_picture(self, camera: str) -> Path | None:
        """Of the start that the scene is to be set up as; None where there is none."""
        return trial.start_picture(self._folder, camera)

    def _owned(self, mode: Record | None) -> list[bool]:
        """Which numbers of a command are the person's while they command."""
        size = len(self._about["dimensions"])
        owned = None if mode is None else owned_of(int(mode.values["owned"]), size)
        return [True] * size if owned is None else owned.tolist()

    def look(self) -> None:
        """Take what is new: at least every second, so that nothing is missed."""
        for record in self._new("steps"):
            values = record.values
            if int(values["step"]) == 0:
                self._trail.clear()
            if values["commanded"]:
                self._trail.append([int(values["command_step"]), *values["action"].tolist()])
            self._recent.append(record)
            self._totals["steps"] += 1
            self._totals["missed"] += int(values["missed_ticks"])
            self._totals["held"] += int(values["held"])
            self._totals["interventions"] += len([line for line in text(values["interventions"]).split("\n") if line])
            for line in text(values["refusals"]).split("\n"):
                if line:
                    self._happened(record.t, line)
        for record in self._new("events"):
            self._happened(record.t, f"{text(record.values['kind'])}: {text(record.values['why'])}")
        for record in self._new("chunks"):
            if int(record.values["status"]) == 0:
                self._chunk = record

    def _happened(self, t: float, line: str) -> None:
        """Lines that differ in their numbers only are one event, which happened several times; the latest is shown."""
        kind = NUMBER.sub("0", line)
        _, _, times = self._events.pop(kind, (t, line, 0))
        self._events[kind] = t, line, times + 1
        if len(self._events) > EVENTS:
            del self._events[next(iter(self._events))]

    def _scene(self) -> list[float] | None:
        """PushT's state, where there is a board to draw it on."""
        record = self._latest("state") if self._about["plane"] and self._about["plane"]["board"] else None
        return None if record is None or "state" not in record.values else record.values["state"].tolist()

    def _advice(self) -> str | None:
        """What helps where the machine is too slow; None where deadlines are kept."""
        missed = sum(int(record.values["missed_ticks"]) for record in self._recent)
        spread = self._timing()["inference_ms"]
        if spread is None or missed < SLOW * len(self._recent):
            return None
        period = 1e3 / self._about["control_rate"]
        took = f"a chunk takes {spread['median']:.0f} ms, a control step {period:.0f}"
        if spread["median"] > period:
            return f"Too slow: {took}. scheduling=rtc does not wait for chunks; fewer sampler steps take less."
        return f"Deadlines are missed although {took}: other programs keep this machine busy."

    def _step(self) -> dict[str, float | None] | None:
        if not self._recent:
            return None
        values = self._recent[-1].values
        numbers = {name: int(values[name]) for name in ("seed", "step", "command_step")}
        return {**numbers, "reward": _plain(values["reward"]), "operator": bool(values["operator"])}

    def _guard(self) -> dict[str, object] | None:
        """The level of the newest chunk that has one, and whether there is an alarm; None where nobody guards."""
        levels = [record.values["guard_level"] for record in self._recent if not np.isnan(record.values["guard_level"])]
        return {"level": _plain(levels[-1]), "alarm": bool(self._recent[-1].values["guard_alarm"])} if levels else None

    def _timing(self) -> dict[str, dict[str, float] | None]:
        """Median and largest of the recent steps, in ms; the delay in control steps."""
        names = ("observation_age_ms", "inference_ms", "lateness_ms", "delay", "jump")
        found = {name: np.array([float(record.values[name]) for record in self._recent]) for name in names}
        found["delay"][found["delay"] < 0] = np.nan
        ticks = np.array([record.t for record in self._recent])
        found["period_ms"] = 1e3 * np.diff(ticks)
        return {name: _spread(values) for name, values in found.items()}

    def _future(self) -> dict[str, object] | None:
        """The newest chunk, from its observation on: its first control step, and its commands."""
        if self._chunk is None or not self._recent:
            return None
        values = self._chunk.values
        if int(values["seed"]) != int(self._recent[-1].values["seed"]):
            return None
        actions = values["chunk"][self._about["n_obs_steps"] - 1 :]
        if not np.isfinite(actions).all():
            return None
        return {"from": int(values["requested_step"]), "actions": actions.round(5).tolist()}

    def picture(self, camera: str) -> tuple[int, bytes] | None:
        """The newest frame of a camera as JPEG, with its number; encoded once, whoever asks."""
        frame = self._latest(f"camera {camera}")
        if frame is None:
            return None
        known = self._encoded.get(camera)
        if known is not None and known[0] == frame.number:
            return known
        self._encoded[camera] = frame.number, jpeg(frame.values["image"], quality=85)
        return self._encoded[camera]


def jpeg(picture: np.ndarray, *, quality: int) -> bytes:
    """`picture` uint8 [H, W, 3] as a file; depth [H, W] as grey (`pictures.preview`)."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(preview(picture) if picture.ndim == 2 else picture).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _plain(value: np.ndarray) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _spread(values: np.ndarray) -> dict[str, float] | None:
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    return {"last": float(known[-1]), "median": float(np.median(known)), "max": float(known.max())}
