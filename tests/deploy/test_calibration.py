"""Latencies from a slow motion: what was injected is found again, on paper for any arm and camera, and in processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import cont2discrete, lfilter, ss2tf

from action_diffusion.deploy.calibrate.command import estimate, run
from action_diffusion.deploy.calibrate.delays import CELLS, Signal, actuation, camera, small
from action_diffusion.deploy.calibrate.motion import RecordedMotion, Wanted, plan, shape
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import Group, make_camera
from action_diffusion.deploy.robot import cell
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy, configuration

PERIOD, N = 1.719, 6
EDGES = PERIOD * np.arange(1, N)
FINE = 0.0002
TOLERANCE = 0.005


def setpoints(seed: int, rate: float = 200.0) -> Signal:
    """The motion, as an arm's process sends it: at its rate, each a little late."""
    t = np.arange(-0.3, N * PERIOD + 0.8, 1 / rate)
    late = np.random.default_rng(seed).uniform(0, 0.0005, len(t))
    return Signal(t + late, shape(np.clip(t / PERIOD, 0, N), N))


def follower(sent: Signal, dead: float, natural: float, damping: float) -> Signal:
    """Where an arm with that dead time (s), natural frequency (rad/s) and damping is, every 0.2 ms."""
    t = np.arange(-1.0, N * PERIOD + 0.8, FINE)
    held = sent.values[np.maximum(0, np.searchsorted(sent.t, t - dead, side="right") - 1)]
    system = (
        np.array([[0.0, 1.0], [-(natural**2), -2 * damping * natural]]),
        np.array([[0.0], [natural**2]]),
        np.array([[1.0, 0.0]]),
        np.zeros((1, 1)),
    )
    above, below = ss2tf(*cont2discrete(system, FINE)[:4])
    return Signal(t, lfilter(above[0], below, held))


def measured(path: Signal, rate: float, noise: float, seed: int) -> Signal:
    """`path`, as encoders give it."""
    t = np.arange(-0.3, N * PERIOD + 0.7, 1 / rate)
    return Signal(t, np.interp(t, *path) + noise * np.random.default_rng(seed).normal(size=len(t)))


def pictures(
    path: Signal,
    *,
    late: float,
    jitter: float = 0.0,
    drop: float = 0.0,
    noise: float = 0.0,
    rate: float = 20.0,
    seed: int,
) -> Signal:
    """Frames of a blob that goes along a curve over a background, stamped `late` to `late + jitter` after exposure."""
    random = np.random.default_rng(seed)
    t = np.arange(0.013, N * PERIOD + 0.5, 1 / rate)
    t = t[random.random(len(t)) >= drop]
    at, stamps = np.interp(t, *path)[:, None, None], t + late + jitter * random.random(len(t))
    y, x = np.mgrid[:24, :24]
    sign = random.choice([-1.0, 1.0])
    blob = np.exp(-((x - 12 - sign * (8 * at - 4)) ** 2 + (y - 12 - 3 * at**2) ** 2) / 10)
    images = 100 * random.random((24, 24)) + sign * 100 * blob + noise * random.normal(size=blob.shape)
    order = np.argsort(stamps)
    return Signal(stamps[order], images.reshape(len(t), -1).astype(np.float32)[order])


# On paper.


@pytest.mark.slow
# The same draws each time: noise of 1e-3 leaves more than the tolerance in one draw of 500, whatever the fit.
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    st.sampled_from([0.0, 0.03, 0.07]) | st.floats(0, 0.12),
    st.floats(8, 100),
    st.floats(0.6, 1.2),
    st.sampled_from([0.0, 0.0005, 0.001]),
    st.sampled_from([100.0, 125.0, 500.0]),
    st.integers(0, 2**31),
)
def test_dead_time_and_lag_of_any_follower(dead, natural, damping, noise, rate, seed):
    sent = setpoints(seed)
    path = follower(sent, dead, natural, damping)
    found = actuation(sent, measured(path, rate, noise, seed), list(EDGES))
    assert found.delay.median == pytest.approx(dead, abs=TOLERANCE)
    assert found.delay.low <= found.delay.median <= found.delay.high < found.delay.low + 2 * TOLERANCE
    b, _ = found.follower
    assert b == pytest.approx(2 * damping / natural, abs=TOLERANCE)
    assert found.unexplained < 0.02
    if natural > 40:  # slower ones have no lag of their own: it depends on how fast the motion is
        assert found.total.median == pytest.approx(dead + b, abs=TOLERANCE)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([0.0, 0.04, 0.085]) | st.floats(-0.02, 0.3),
    st.sampled_from([0.0, 0.005]),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.0, 2.0, 8.0]),
    st.sampled_from([15.0, 20.0, 30.0, 60.0]),
    st.integers(0, 2**31),
)
def test_how_late_stamps_are(late, jitter, drop, noise, rate, seed):
    path = follower(setpoints(seed), 0.03, 10, 1.0)
    frames = pictures(path, late=late, jitter=jitter, drop=drop, noise=noise, rate=rate, seed=seed)
    sight = camera(frames, measured(path, 100, 0.001, seed), list(EDGES))
    assert sight.late.median == pytest.approx(late + jitter / 2, abs=TOLERANCE)
    assert sight.seen > 0.9
    assert sight.frames[0] <= sight.late.median <= sight.frames[1]


def test_an_arm_that_is_where_it_is_told_to_be():
    sent = setpoints(0)
    found = actuation(sent, Signal(sent.t + 1e-4, sent.values), list(EDGES))
    assert abs(found.delay.median) < 0.003
    assert abs(found.total.median) < 0.003


def test_one_period_in_which_somebody_walks_by_and_pushes_the_arm_changes_nothing():
    sent = setpoints(1)
    path = follower(sent, 0.03, 40, 1.0)
    t, values = measured(path, 200, 0.0, 1)
    pushed = values + 0.1 * np.exp(-(((t - 3.8) / 0.1) ** 2))
    assert actuation(sent, Signal(t, pushed), list(EDGES)).total.median == pytest.approx(0.08, abs=TOLERANCE)
    frames = pictures(path, late=0.04, rate=30, seed=1)
    walked = (frames.t > 3.6) & (frames.t < 4.6)
    frames.values[walked, :300] += 60
    sight = camera(frames, Signal(t, values), list(EDGES))
    assert sight.late.median == pytest.approx(0.04, abs=TOLERANCE)


def test_what_a_camera_does_not_see_is_not_made_up():
    path = follower(setpoints(2), 0.0, 40, 1.0)
    state, frames = measured(path, 200, 0.0, 2), pictures(path, late=0.04, seed=2)
    noise = np.random.default_rng(2).normal(size=frames.values.shape)
    few = Signal(frames.t[::9], frames.values[::9])
    still = Signal(frames.t, np.ones_like(frames.values))
    views = {"blind": Signal(frames.t, noise), "slow": few, "covered": still, "front": frames}
    arrived = {key: np.full(len(view.t), 0.002) for key, view in views.items()}
    taken = RecordedMotion(sent=setpoints(2), state=state, frames=views, arrived=arrived, edges=EDGES, events=[])
    found = estimate("ur", taken, dict.fromkeys(views, 0.01), None)
    assert [key for key, view in found.cameras.items() if view.sight is not None] == ["front"]
    assert found.cameras["front"].setting == pytest.approx(0.05, abs=TOLERANCE)
    assert found.cameras["front"].age.median == pytest.approx(0.042, abs=TOLERANCE)
    assert sum("does not see the motion" in warning for warning in found.warnings()) == 3
    busy = estimate("sim_pusht", replace(taken, frames={}, lost=0.25), {}, None)
    assert list(busy.warnings()) == ["the simulator stood still for 0.25 s: this machine is too busy for it"]
    assert any("cameras.front.stamp_latency: 0.05" in line for line in found.settings())
    resting = RecordedMotion(
        sent=taken.sent, state=Signal(state.t, 0 * state.t), frames={}, arrived={}, edges=EDGES, events=[]
    )
    with pytest.raises(InputError, match="the arm did not follow"):
        estimate("ur", resting, {}, None)


@pytest.mark.parametrize("size", [(96, 96), (480, 640), (65, 40), (1080, 1920)])
def test_pictures_are_made_small(size):
    image = np.zeros((*size, 3), np.uint8)
    image[:, : size[1] // 2] = [30, 60, 90]
    values = small(image)
    assert values.dtype == np.float32
    assert len(values) <= CELLS**2
    assert (values.min(), values.max()) == (0, 60)


# The motion.

LIMITS = Limits(
    low=np.array([-1.0, -1.0, -2.0, -2.0, -2.0, 0.0]) * 0.9,
    high=np.array([1.0, 1.0, 2.0, 2.0, 2.0, 1.0]) * 0.9,
    max_step=np.array([np.inf] * 5 + [1.0]),
    velocity=np.array([1.0, 0.3, 1.0, 1.0, 1.0, np.inf]),
    acceleration=np.array([4.0, 4.0, 4.0, 4.0, 4.0, np.inf]),
    jerk=np.array([80.0, 80.0, 80.0, 80.0, 80.0, np.inf]),
)


def arm(*start: float) -> Any:
    command = (
        Group(name="position", size=2, kind="linear"),
        Group(name="rotation", size=3, kind="rotation"),
        Group(name="gripper", size=1, kind="hold"),
    )
    latest = SimpleNamespace(values={"command": np.array([*start, *[0.0] * (6 - len(start))])})
    return SimpleNamespace(rate=200.0, command=command, limits=LIMITS, last_setpoint=lambda: latest)


@pytest.mark.parametrize(("number", "start"), [(0, [0.0]), (0, [0.85]), (1, [0.0, -0.89])])
def test_the_motion_keeps_to_a_part_of_the_limits_and_ends_where_it_began(number, start):
    motion = plan(arm(*start), Wanted(number=number))
    path, dt = motion.commands[:, number], motion.times[1]
    others = np.delete(motion.commands, number, axis=1)
    assert np.array_equal(others, np.tile(others[0], (len(others), 1)))
    assert path[0] == path[-1] == start[number]
    assert 0.17 < np.ptp(path) < 0.22
    assert (path >= LIMITS.low[number]).all()
    assert (path <= LIMITS.high[number]).all()
    bounds = [(LIMITS.velocity, 0.3), (LIMITS.acceleration, 0.5), (LIMITS.jerk, 0.5)]
    for order, (limit, share) in enumerate(bounds, 1):
        assert limit is not None
        assert np.abs(np.diff(path, order)).max() / dt**order <= 1.05 * share * limit[number]
    assert len(motion.edges) == 5
    assert np.diff(motion.edges) == pytest.approx(np.full(4, motion.edges[0]))
    assert motion.edges[0] >= PERIOD


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"number": 2}, r"number=2 is none that may move; those are \[0, 1\]"),
        ({"number": 5}, "none that may move"),
        ({"number": 7}, "none that may move"),
        ({"distance": 1.7}, "no room on either side"),
        ({"number": 1, "distance": 0.85}, "give a smaller one"),
        ({"distance": -1.0}, "must be a number above 0"),
        ({"period": 1.0}, "period=1.0 must be above 1.4 s"),
        ({"n_periods": 3}, "at least 4"),
        ({"number": 0.5}, "number=0.5 must be a whole number"),
    ],
)
def test_a_motion_that_cannot_be_is_refused(wanted, message):
    with pytest.raises(InputError, match=message):
        plan(arm(), Wanted(**wanted))


# In processes.


def config(folder: Path, *options: str) -> Deploy:
    return configuration.settings("deploy", ["calibrate=true", f"output_dir={folder}", *options])


@pytest.mark.slow
def test_injected_latencies_are_found_without_a_policy(tmp_path, capsys):
    injected = ["simulated.latency=0.03", "simulated.camera.latency=0.04", "simulated.camera.jitter=0.005"]
    options = [*injected, "simulated.camera.drop=0.1", "simulated.camera.stamped=arrival", "calibration.n_periods=4"]
    assert run(config(tmp_path, *options)) == 0
    found = json.loads((tmp_path / "latency.json").read_text())
    eye = found["cameras"]["image"]
    assert eye["stamps_late_ms"]["median"] == pytest.approx(42.5, abs=5)
    assert eye["latency_ms"]["median"] == pytest.approx(42.5, abs=5)
    assert found["actuation"]["latency_ms"]["median"] == pytest.approx(30, abs=5)
    assert 150 < found["actuation"]["lag_ms"] < 220  # of PushT's own spring and damper
    assert found["inference_ms"] is None
    assert (tmp_path / "latency.png").read_bytes()[:4] == b"\x89PNG"
    assert f"give simulated.camera.stamp_latency={eye['stamp_latency']:.3f}" in capsys.readouterr().out
    with pytest.raises(InputError, match="already holds latencies"):
        run(config(tmp_path))


@pytest.mark.slow
def test_what_was_found_makes_the_stamps_right_and_a_policy_is_timed(tmp_path):
    from deployments import save_bundle

    bundle = save_bundle(tmp_path / "bundle")
    injected = ["simulated.latency=0.07", "simulated.camera.latency=0.085", "simulated.camera.stamped=arrival"]
    options = [
        f"bundle={bundle}",
        *injected,
        "simulated.camera.stamp_latency=0.085",
        "calibration.number=1",
        "calibration.n_periods=5",
    ]
    assert run(config(tmp_path / "out", *options, "scheduling=rtc", "device=cpu")) == 0
    found = json.loads((tmp_path / "out" / "latency.json").read_text())
    eye = found["cameras"]["image"]
    assert eye["stamps_late_ms"]["median"] == pytest.approx(0, abs=5)
    assert eye["stamp_latency"] == pytest.approx(0.085, abs=0.005)
    assert eye["latency_ms"]["median"] == pytest.approx(85, abs=5)
    assert found["actuation"]["latency_ms"]["median"] == pytest.approx(70, abs=5)
    assert 0 < found["inference_ms"]["low"] <= found["inference_ms"]["median"] <= found["inference_ms"]["high"]


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(InputError, match="dry_run=true forbids"):
        run(config(tmp_path, "dry_run=true"))
    with pytest.raises(InputError, match="unknown robot"):
        run(config(tmp_path, "robot=nobody"))
    with pytest.raises(InputError, match=r"unknown simulated.camera.stamped 'never'"):
        make_camera("sim_pusht", world=".", stamped="never")
    with pytest.raises(InputError, match="front: stamp_latency=now must be a number of seconds"):
        cell.camera_setups({"cameras": {"front": {"driver": "usb", "stamp_latency": "now"}}})
    (setup,) = cell.camera_setups({"cameras": {"front": {"driver": "usb", "stamp_latency": 0.03}}}).values()
    assert (setup.stamp_latency, dict(setup.settings)) == (0.03, {})
