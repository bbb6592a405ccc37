"""The scripted experts: they succeed, and do the same whenever they see the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

pytest.importorskip("robosuite", reason="robosuite is not installed: pip install 'action-diffusion[robomimic]'")

from action_diffusion.envs.robosuite import expert as manipulation_expert
from action_diffusion.envs.robosuite import tasks
from action_diffusion.envs.robosuite.expert import CAN, LIFT, SQUARE, TaskPlan, decide, seen

DOWN = Rotation.from_euler("x", np.pi)


def observation(hand=(0, 0, 1), object=(0, 0, 0.83), width=0.08, object_yaw=0.0) -> dict[str, np.ndarray]:
    pose = Rotation.from_euler("z", object_yaw).as_quat()
    return {
        "object": np.concatenate([object, pose, np.zeros(7)]).astype(np.float32),
        "robot0_eef_pos": np.array(hand, np.float32),
        "robot0_eef_quat": DOWN.as_quat().astype(np.float32),
        "robot0_gripper_qpos": np.array([width / 2, -width / 2], np.float32),
        "robot0_gripper_qvel": np.zeros(2, np.float32),
    }


def order(plan: TaskPlan, **situation):
    return decide(seen(observation(**situation), plan), plan)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "steps"), [("lift", 60), ("can", 180), ("square", 180)])
def test_an_expert_succeeds(task, steps):
    env = getattr(tasks, task)(max_steps=steps)
    expert = getattr(manipulation_expert, task)(seed=0)
    env.reset(0)
    expert.reset()
    reward, done = 0.0, False
    while not done:
        action = expert.act(env.observe(expert.observations))
        assert action.dtype == np.float32
        assert abs(action).max() <= 1
        reward, done = env.step(action)
    assert reward == 1
    env.close()


def test_the_seed_decides_the_noise_and_nothing_else_is_remembered():
    first, same, other = (manipulation_expert.lift(seed=seed) for seed in (0, 0, 1))
    far = observation(hand=(0.02, 0.01, 0.9))
    np.testing.assert_array_equal(first.act(far), same.act(far))
    assert abs(first.act(far) - other.act(far)).max() > 0
    actions = [first.act(far) for _ in range(200)]
    np.testing.assert_allclose(np.mean(actions, axis=0), first.act(far), atol=0.1)


@pytest.mark.parametrize("plan", [LIFT, CAN, SQUARE])
def test_the_phase_is_seen(plan):
    grasp = np.array([0, 0, 0.83]) + plan.grasp
    holding = sum(plan.width) / 2
    above = order(plan, hand=grasp + np.array([0, 0, 0.2]))
    assert above.shift[2] < -0.1
    assert above.gripper == -1
    beside = order(plan, hand=grasp + np.array([0.1, 0, 0]))
    assert beside.shift[2] > 0.05
    assert beside.gripper == -1
    closing = order(plan, hand=grasp, width=0.08)
    assert np.linalg.norm(closing.shift) < 1e-6
    assert closing.gripper == 1
    lifting = order(plan, hand=grasp, width=holding)
    assert lifting.shift[2] > 0.05
    np.testing.assert_allclose(lifting.shift[:2], 0, atol=1e-6)
    assert lifting.gripper == 1
    missed = order(plan, hand=grasp + np.array([0, 0, 0.03]), width=0.001)
    assert missed.gripper == -1


@pytest.mark.parametrize("plan", [CAN, SQUARE])
def test_over_the_goal_it_goes_down_and_lets_go(plan):
    yaw = plan.yaws[0] if plan.yaws else 0.0
    offset = Rotation.from_euler("z", yaw).apply(plan.grasp)
    holding = sum(plan.width) / 2

    def at(height: float, width: float = holding):
        place = np.array([*plan.goal, height])
        return order(plan, hand=place + offset, object=place, object_yaw=yaw, width=width)

    assert at(plan.carry).shift[2] < -0.05
    assert at(plan.carry).gripper == 1
    assert at(plan.low).gripper == -1
    assert at(plan.low).shift[2] == 0  # not before the fingers are off
    assert at(plan.low, width=0.08).shift[2] > 0.05


@given(
    hand=st.tuples(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3), st.floats(0.82, 1.1)),
    yaw=st.floats(-3, 3),
    width=st.floats(0, 0.08),
)
@settings(max_examples=100, deadline=None)
def test_orders_are_finite_and_turn_no_further_than_needed(hand, yaw, width):
    for plan in (LIFT, CAN, SQUARE):
        shift, turn, gripper = order(plan, hand=hand, object_yaw=yaw, width=width)
        assert np.isfinite(shift).all()
        assert np.linalg.norm(turn) <= np.pi / 2 + 1e-6 or plan.yaws
        assert gripper in (-1, 1)
