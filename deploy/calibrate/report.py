"""What `calibrate=true` found: a table, `latency.json`, `latency.png`, and which setting to write where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from action_diffusion.deploy.calibrate.delays import Actuation, Estimate, Sight
from action_diffusion.deploy.calibrate.motion import RecordedMotion
from action_diffusion.deploy.sim.world import stood_still
from action_diffusion.files import atomic_path

SEEN = 0.5
"""Below this share of the pictures' best component the motion counts as not seen."""
UNSURE = 0.02
"""Periods that differ by more than this (s) are worth a warning."""
UNEXPLAINED = 0.01
"""Above this share of the motion the model of the arm does not tell dead time from lag."""
NEGLIGIBLE = 0.002
"""Stamps that are late by less (s) are right."""


@dataclass(frozen=True, kw_only=True)
class CameraFound:
    """sight: None where the camera sees too few frames of the motion, or none of it. arrived: when its frames came,
    relative to their stamps (s). corrected: the stamp_latency (s) that was taken off already."""

    sight: Sight | None
    arrived: np.ndarray
    corrected: float

    @property
    def age(self) -> Estimate:
        """From exposure to arrival: median, 5 % and 95 % of the frames."""
        assert self.sight is not None
        low, median, high = np.percentile(self.arrived, [5, 50, 95]) + self.sight.late.median
        return Estimate(float(median), float(low), float(high))

    @property
    def setting(self) -> float:
        """The stamp_latency (s) with which its stamps are right."""
        assert self.sight is not None
        return self.corrected + self.sight.late.median


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """All of it. inference: seconds of each prediction; None without a policy."""

    robot: str
    measured: RecordedMotion
    actuation: Actuation
    cameras: Mapping[str, CameraFound]
    inference: list[float] | None

    def warnings(self) -> Iterator[str]:
        for key, camera in self.cameras.items():
            if camera.sight is None:
                yield f"camera {key} does not see the motion: move another number, or farther"
            elif camera.sight.late.high - camera.sight.late.low > UNSURE:
                yield f"camera {key}: the periods differ by more than {1e3 * UNSURE:g} ms; did something else move?"
        delay = self.actuation.delay
        if delay.high - delay.low > UNSURE or self.actuation.unexplained > UNEXPLAINED:
            yield "the arm does not follow as the model has it: trust the total, not how it is shared out"
        if words := stood_still(self.measured.lost):
            yield words

    def settings(self) -> Iterator[str]:
        """A line for each setting, and where it goes."""
        simulated = self.robot.startswith("sim_")
        for key, camera in self.cameras.items():
            if camera.sight is None:
                continue
            if abs(camera.sight.late.median) < NEGLIGIBLE:
                yield f"camera {key}: its stamps are right, nothing to set"
            elif simulated:
                yield f"camera {key}: give simulated.camera.stamp_latency={camera.setting:.3f}"
            else:
                yield f"camera {key}: write cameras.{key}.stamp_latency: {camera.setting:.3f} into the hardware's file"
        late = max((camera.age.median for camera in self.cameras.values() if camera.sight is not None), default=0.0)
        slow = f"simulated.latency={self.actuation.delay.median:.3f} simulated.camera.latency={max(0.0, late):.3f}"
        if not simulated:
            yield f"a simulated robot that is as slow: robot=sim_pusht {slow}"


def _ms(estimate: Estimate) -> dict[str, float]:
    return {"median": 1e3 * estimate.median, "low": 1e3 * estimate.low, "high": 1e3 * estimate.high}


def _of(seconds: list[float]) -> Estimate:
    """Median, the least, and the 95th percentile."""
    least, median, most = np.percentile(seconds, [0, 50, 95])
    return Estimate(float(median), float(least), float(most))


def summary(found: Calibrated) -> dict[str, object]:
    """What goes into `latency.json`, in ms; low and high as the table says."""
    cameras: dict[str, object] = {}
    for key, camera in found.cameras.items():
        cameras[key] = None
        if camera.sight is not None:
            cameras[key] = {
                "latency_ms": _ms(camera.age),
                "stamps_late_ms": _ms(camera.sight.late),
                "single_frames_ms": [1e3 * end for end in camera.sight.frames],
                "seen": camera.sight.seen,
                "n_frames": len(camera.sight.component),
                "stamp_latency": round(camera.setting, 4),
            }
    arm = found.actuation
    return {
        "robot": found.robot,
        "period_s": float(np.diff(found.measured.edges).mean()),
        "n_periods": len(found.measured.edges) - 1,
        "cameras": cameras,
        "actuation": {
            "latency_ms": _ms(arm.delay),
            "lag_ms": 1e3 * arm.lag,
            "total_ms": _ms(arm.total),
            "unexplained": arm.unexplained,
        },
        "inference_ms": None if found.inference is None else _ms(_of(found.inference)),
        "warnings": list(found.warnings()),
        "settings": list(found.settings()),
    }


def print_table(found: Calibrated) -> None:
    periods = f"{len(found.measured.edges) - 1} periods"
    table = Table("ms", "median", "from", "to", "of", title=f"latency of {found.robot}, relative to its states' time")
    for key, camera in found.cameras.items():
        if camera.sight is None:
            table.add_row(f"camera {key}", "–", "", "", "the motion is not seen")
            continue
        _row(table, f"camera {key}: from exposure to arrival", camera.age, "5 to 95 % of the frames")
        _row(table, f"camera {key}: its stamps are late by", camera.sight.late, periods)
    _row(table, "actuation: from a setpoint until the arm begins to follow", found.actuation.delay, periods)
    table.add_row("    and the lag with which it follows", f"{1e3 * found.actuation.lag:.1f}", "", "", "")
    _row(table, "    together: until it is there", found.actuation.total, periods)
    if found.inference is not None:
        _row(table, "inference", _of(found.inference), f"{len(found.inference)} predictions, to 95 %")
    Console().print(table)
    for line in found.warnings():
        print(f"warning: {line}")
    for line in found.settings():
        print(line)


def _row(table: Table, name: str, estimate: Estimate, of: str) -> None:
    table.add_row(name, *(f"{1e3 * value:.1f}" for value in (estimate.median, estimate.low, estimate.high)), of)


def write(found: Calibrated, folder: Path) -> None:
    """latency.json and latency.png."""
    with atomic_path(folder / "latency.json") as temporary:
        temporary.write_text(json.dumps(summary(found), indent=2) + "\n", encoding="utf-8")
    with atomic_path(folder / "latency.png") as temporary:
        _draw(found).savefig(temporary, dpi=120)


def _draw(found: Calibrated) -> Figure:
    seen = {key: camera.sight for key, camera in found.cameras.items() if camera.sight is not None}
    figure = Figure(figsize=(9, 2.6 * (1 + 2 * len(seen))), layout="constrained")
    axes = figure.subplots(1 + 2 * len(seen), 1, squeeze=False)[:, 0]
    _draw_motion(axes[0], found)
    for i, (key, sight) in enumerate(seen.items()):
        _draw_camera(axes[1 + 2 * i], found, key, sight)
        _draw_costs(axes[2 + 2 * i], key, sight)
    return figure


def _draw_motion(axes: Axes, found: Calibrated) -> None:
    measured, start = found.measured, found.measured.sent.t[0]
    axes.step(measured.sent.t - start, measured.sent.values, where="post", label="setpoints", linewidth=1)
    axes.plot(measured.state.t - start, measured.state.values, label="states", linewidth=1)
    axes.plot(measured.state.t - start, found.actuation.predicted, "--", label="the model's", linewidth=1)
    for edge in measured.edges:
        axes.axvline(edge - start, color="0.8", linewidth=0.6, zorder=0)
    axes.set(
        xlabel="s", ylabel="the number that moved", title=f"actuation: {1e3 * found.actuation.total.median:.0f} ms"
    )
    axes.legend(loc="upper right", fontsize=8)


def _draw_camera(axes: Axes, found: Calibrated, key: str, sight: Sight) -> None:
    t = sight.t - found.measured.sent.t[0]
    axes.plot(t, sight.component, ".", markersize=3, label="a component of the pictures")
    axes.plot(t, sight.predicted, linewidth=1, label=f"as the states {1e3 * sight.late.median:.1f} ms before say")
    axes.set(xlabel="s, by the stamps", title=f"camera {key}")
    axes.legend(loc="upper right", fontsize=8)


def _draw_costs(axes: Axes, key: str, sight: Sight) -> None:
    axes.plot(1e3 * sight.lags, sight.costs, linewidth=1)
    axes.axvline(1e3 * sight.late.median, color="0.5", linewidth=0.8)
    axes.set(xlabel="lag tried (ms)", ylabel="left over (log)", title=f"camera {key}: how late its stamps are")
