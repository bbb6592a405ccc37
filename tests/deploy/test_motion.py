"""Motion: waypoints become setpoints that keep to every limit, whatever is asked for, and stops that do too."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from action_diffusion.deploy.arm.gate import WaypointGate
from action_diffusion.deploy.arm.path import Path
from action_diffusion.deploy.arm.shaper import SetpointCheck, Shaper
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.obstacles import Obstacles
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.errors import InputError

PERIOD = 0.005
DOWN = (np.pi, 0.0, 0.0)
LAYOUT = CommandLayout([Group(name="joints", size=3, kind="linear"), Group(name="gripper", size=1, kind="hold")])
POSE = CommandLayout(
    [
        Group(name="position", size=3, kind="linear", unit="m"),
        Group(name="rotation", size=3, kind="rotation", unit="rad", reference=DOWN),
    ]
)


def limits(n: int = 4, **changes: float) -> Limits:
    values = {"low": -1, "high": 1, "max_step": 0.5, "velocity": 1, "acceleration": 5, "jerk": 80} | changes
    return Limits(**{name: np.full(n, float(value)) for name, value in values.items()})


def follow(shaper: Shaper, path: Path, n: int, t: float = 0.0) -> np.ndarray:
    """The next n setpoints [n, A]."""
    rows = []
    for k in range(1, n + 1):
        shaper.follow(path, t + k * PERIOD)
        rows.append(shaper.q.copy())
    return np.array(rows)


def make(layout: CommandLayout = LAYOUT, limits: Limits = limits(), **options) -> tuple[Shaper, SetpointCheck]:  # noqa: B008
    return (
        Shaper(layout=layout, limits=limits, period=PERIOD, **options),
        SetpointCheck(layout=layout, limits=limits, period=PERIOD),
    )


# Interpolation.


def test_joints_go_straight_and_grippers_wait():
    path = Path(LAYOUT, [1.0, 2.0, 4.0], [np.zeros(4), np.array([1.0, 2, 3, 1]), np.array([1.0, 2, 3, 0])])
    np.testing.assert_allclose(path.at(1.25), [0.25, 0.5, 0.75, 0])
    np.testing.assert_allclose(path.at(0.0), np.zeros(4))
    np.testing.assert_allclose(path.at(2.0), [1, 2, 3, 1])
    np.testing.assert_allclose(path.at(3.9), [1, 2, 3, 1])
    np.testing.assert_allclose(path.at(9.0), [1, 2, 3, 0])


@given(st.integers(0, 2**32 - 1))
def test_rotations_turn_as_scipys_slerp_does(seed):
    random = np.random.default_rng(seed)
    turns = (Rotation.from_rotvec(DOWN) * Rotation.from_rotvec(random.normal(0, 0.6, (2, 3)))).as_rotvec()
    commands = np.concatenate([random.normal(size=(2, 3)), turns], axis=1)
    path = Path(POSE, [0.0, 1.0], list(POSE.to_coordinates(commands)))
    share = random.uniform(0, 0.999)
    got = POSE.to_command(path.at(share))
    expected = Slerp([0, 1], Rotation.from_rotvec(turns))(share)
    assert (Rotation.from_rotvec(got[3:]).inv() * expected).magnitude() < 1e-9
    np.testing.assert_allclose(got[:3], (1 - share) * commands[0, :3] + share * commands[1, :3])


def test_coordinates_are_small_where_rotation_vectors_of_the_tool_wrap():
    """A tool that points down has rotation vectors near pi, and half of them near minus pi."""
    turns = (Rotation.from_rotvec(DOWN) * Rotation.from_rotvec([[0.01, 0, 0], [-0.01, 0, 0]])).as_rotvec()
    assert np.abs(turns[0] - turns[1]).max() > 6
    commands = np.concatenate([np.zeros((2, 3)), turns], axis=1)
    coordinates = POSE.to_coordinates(commands)
    assert np.abs(coordinates).max() < 0.011
    np.testing.assert_allclose(POSE.to_command(coordinates), commands, atol=1e-9)


def test_new_waypoints_take_over_at_the_first_of_them_or_at_once():
    path = Path(LAYOUT, [0.0, 1.0, 2.0], [np.full(4, float(i)) for i in range(3)])
    later = path.replace(0.5, [1.5, 2.5], [np.full(4, 5.0), np.full(4, 6.0)])
    assert [later.at(t)[0] for t in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)] == pytest.approx([0.5, 0.75, 1, 3, 5, 5.5])
    assert [later.at(t)[3] for t in (0.5, 0.99, 1.0, 1.49, 1.5)] == pytest.approx([0, 0, 1, 1, 5])
    at_once = path.replace(0.5, [0.3, 0.45, 1.0], [np.full(4, v) for v in (7.0, 8.0, 9.0)])
    assert at_once.times == [0.45, 1.0]
    assert at_once.at(0.5)[3] == 8


# Setpoints.


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_no_setpoint_leaves_the_limits_whatever_the_path(seed):
    random = np.random.default_rng(seed)
    shaper, check = make()
    q = random.uniform(-1, 1, 4)
    shaper.reset(q)
    check.reset(q)
    path, t = Path(LAYOUT, [0.0], [q]), 0.0
    for k in range(300):
        if k % 20 == 0:
            n = random.integers(1, 6)
            times = t - 0.05 + np.cumsum(random.uniform(0.005, 0.2, n))
            path = path.replace(t, list(times), list(random.uniform(-1, 1, (n, 4))))
        t += PERIOD
        if 140 <= k < 170:
            shaper.brake(q)
        else:
            shaper.follow(path, t)
        assert check.refuse(shaper.q) is None


def test_a_line_within_the_limits_is_followed_exactly_and_its_end_is_not_overrun():
    shaper, _ = make()
    path = Path(LAYOUT, [0.0, 1.0], [np.zeros(4), np.array([0.5, 0.25, 0.0, 0.0])])
    q = follow(shaper, path, 260)
    expected = np.array([path.at((k + 1) * PERIOD) for k in range(260)])
    np.testing.assert_allclose(q[80:120], expected[80:120], atol=1e-9)
    assert q.max(axis=0)[0] <= 0.5 + 1e-9
    np.testing.assert_allclose(q[-1], path.points[-1], atol=1e-9)
    assert shaper.at_rest


def test_a_path_that_runs_into_a_limit_is_left_in_time_to_brake():
    shaper, check = make()
    path = Path(LAYOUT, [0.0, 1.0, 2.0], [np.zeros(4), np.full(4, 0.95), np.full(4, 1.9)])
    check.reset(np.zeros(4))
    reasons = []
    for k in range(1, 400):
        reasons.append(shaper.follow(path, k * PERIOD))
        assert check.refuse(shaper.q) is None
    assert any(reason and reason.startswith("braking in time for the limits of number 0") for reason in reasons)
    assert shaper.q[0] == pytest.approx(1.0, abs=0.05)


def test_a_stop_brakes_as_fast_as_the_limits_allow_and_keeps_the_gripper():
    shaper, check = make()
    check.reset(np.zeros(4))
    path = Path(LAYOUT, [0.0, 1.0], [np.zeros(4), np.array([0.9, 0, 0, 0.3])])
    for row in follow(shaper, path, 100):
        assert check.refuse(row) is None
    speed, n = shaper.v[0], 0
    while not shaper.at_rest:
        shaper.brake(np.full(4, 9.0))
        assert check.refuse(shaper.q) is None
        n += 1
    assert speed > 0.8
    assert n * PERIOD == pytest.approx(speed / 5 + 5 / 80, abs=0.02)
    assert shaper.q[3] == 0


def test_an_arm_whose_limits_leave_out_zero_moves_up_to_them_and_no_further():
    """A hand above a table: 0 is no place on any of its ways."""
    above = limits(low=2.0, high=3.0)
    shaper, check = make(limits=above)
    shaper.reset(np.array([2.5, 2.5, 2.5, 2.5]))
    check.reset(shaper.q)
    for end in (1.5, 3.5):
        path = Path(LAYOUT, [0.0, 1.0], [shaper.q.copy(), np.array([end, end, 2.5, 2.5])])
        for k in range(400):
            shaper.follow(path, k * PERIOD)
            assert check.refuse(shaper.q) is None
        assert abs(shaper.q[0] - np.clip(end, 2.0, 3.0)) < 0.02
    while not shaper.at_rest:
        shaper.brake(shaper.q)
        assert check.refuse(shaper.q) is None


def test_a_held_target_is_recalled_to_where_the_arm_is_within_max_step():
    layout = CommandLayout([Group(name="target", size=2, kind="hold", at_stop="present")])
    shaper, check = make(layout, limits(2))
    shaper.reset(np.array([0.9, -0.9]))
    check.reset(shaper.q)
    for _ in range(5):
        shaper.brake(np.array([-0.4, -3.0]))
        assert check.refuse(shaper.q) is None
    np.testing.assert_allclose(shaper.q, [-0.4, -1.0])


def test_an_obstacle_is_not_reached_and_a_way_past_it_is_free():
    obstacles = Obstacles.of({"table": 0.1, "spheres": [[0.5, 0.0, 0.5, 0.1]]})

    def blocked(q: np.ndarray) -> str | None:
        return obstacles.touched([[*q[:3], 0.05]])

    shaper, _ = make(blocked=blocked)
    shaper.reset(np.array([0.0, 0, 0.5, 0]))
    into = Path(LAYOUT, [0.0, 2.0], [shaper.q.copy(), np.array([0.5, 0, 0.5, 0])])
    q = follow(shaper, into, 500)
    assert q[:, 0].max() <= 0.35 + 1e-9
    assert q[-1, 0] > 0.3
    down = Path(LAYOUT, [0.0, 2.0], [shaper.q.copy(), np.array([0.2, 0, -0.5, 0])])
    assert follow(shaper, down, 500)[:, 2].min() >= 0.15 - 1e-9


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([np.nan, 0, 0, 0], "not finite"),
        ([1.1, 0, 0, 0], r"setpoint\[0\] = 1.1 is outside"),
        ([0.01, 0, 0, 0], "exceeds the velocity limit"),
        ([0.002, 0, 0, 0], "exceeds the acceleration limit"),
        ([0.00005, 0, 0, 0], "exceeds the jerk limit"),
        ([0, 0, 0, 0.6], "more than max_step"),
    ],
)
def test_the_last_look_refuses_and_does_not_count_what_it_refused(bad, reason):
    _, check = make()
    check.reset(np.zeros(4))
    assert re.search(reason, check.refuse(np.array(bad, dtype=float)))
    assert check.refuse(np.zeros(4)) is None


# What has no limits does not start.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": [0.0] * 4}, "limits.high has no value"),
        ({"low": [0.0] * 4, "high": [1.0] * 4}, "limits.velocity has no value for joints: nothing moves without"),
        (limits().plain() | {"jerk": None}, "limits.jerk has no value for joints"),
        (limits().plain() | {"max_step": [1, 1, 1, np.inf]}, "limits.max_step has no value for gripper"),
        (limits().plain() | {"high": [np.inf] * 4}, "limits.high has no value for joints, gripper"),
        (limits(3).plain(), "limits are for 3 values, a command has 4"),
        ({"velocty": [1.0]}, "did you mean velocity"),
        (limits().plain() | {"jerk": [0.0] * 4}, "jerk must be above 0"),
    ],
)
def test_a_missing_limit_is_named(given, message):
    with pytest.raises(InputError, match=message):
        LAYOUT.check_limits(Limits.of(given))


def test_a_rotation_must_keep_to_less_than_half_a_turn():
    with pytest.raises(InputError, match=r"turn by 5.20 rad from its reference"):
        POSE.check_limits(limits(6, low=-3, high=3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tabel": 0.0}, "did you mean table"),
        ({"spheres": [[0, 0, 0]]}, "obstacles.spheres has shape"),
        ({"workspace": [[0, 0, 0], [1, 1, 0]]}, "leaves no room"),
        ({"spheres": [[0, 0, 0, float("nan")]]}, "expected numbers"),
    ],
)
def test_obstacles_that_make_no_sense_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        Obstacles.of(given)
    assert Obstacles.of({"table": None}) is None


# The gate in the arm's process.

GOOD: dict[str, Any] = {
    "sent": 9.99,
    "times": [10.0, 10.1],
    "points": np.zeros((2, 4)),
    "now": 10.0,
    "before": np.zeros(4),
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"points": np.zeros((2, 3))}, "waypoints of shape"),
        ({"points": np.zeros((0, 4)), "times": []}, "waypoints of shape"),
        ({"points": np.zeros(4)}, "waypoints of shape"),
        ({"times": [10.0]}, "waypoints of shape"),
        ({"points": np.array([[0, 0, 0, 0], [0, np.inf, 0, 0]])}, "not finite"),
        ({"times": [10.0, np.nan]}, "not finite"),
        ({"points": np.full((2, 4), 1e300)}, "not finite"),
        ({"sent": np.nan}, "not finite"),
        ({"sent": 9.8}, "stale: the message is 200 ms old"),
        ({"sent": 10.1}, "stale"),
        ({"times": [10.1, 10.0]}, "times of the waypoints do not ascend"),
        ({"times": [9.6, 9.7]}, "the last waypoint was due 300 ms ago"),
        ({"times": [10.0, 1e9]}, "more than 10 s from now"),
        ({"points": np.full((2, 4), 1.2)}, r"waypoint\[0\] = 1.2 is outside"),
        ({"points": np.array([[0, 0, 0, 0.6], [0, 0, 0, 0.6]])}, r"waypoint\[3\] changes by 0.6 at once"),
        ({"points": np.array([[0, 0, 0, 0], [0, 0.2, 0, 0]])}, r"waypoint\[1\] asks for a velocity of 2"),
    ],
)
def test_waypoints_that_an_arm_must_not_follow(change, reason):
    gate = WaypointGate(layout=LAYOUT, limits=limits())
    assert re.search(reason, gate.refuse(**(GOOD | change)))
    assert gate.refuse(**GOOD) is None
    assert "a later message" in gate.refuse(**GOOD)
