"""Controller settings: files of every version of robosuite drive the one that is installed."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("robosuite", reason="robosuite is not installed: pip install 'action-diffusion[robomimic]'")

from action_diffusion.envs.robosuite.controllers import ARM_CONTROLLERS, absolute, upgraded
from action_diffusion.errors import InputError

LIMITS = {"input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3, "output_min": [-0.05] * 3 + [-0.5] * 3}
IN_1_4 = {
    "type": "OSC_POSE",
    **LIMITS,
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}
IN_1_2 = {key: value for key, value in IN_1_4.items() if not key.startswith("damping")}
IN_1_2 |= {"damping": 1, "damping_limits": [0, 10]}


def arm(config: dict, name: str = "right") -> dict:
    return config["body_parts"][name]


@pytest.mark.parametrize("old", [IN_1_2, IN_1_4], ids=["1.2", "1.4"])
def test_settings_of_one_arm_become_those_of_a_robot(old):
    [config] = upgraded(old, ["Panda"])
    assert config["type"] == "BASIC"
    assert {key: arm(config)[key] for key in ("type", "kp", "damping_ratio", "damping_ratio_limits")} == {
        "type": "OSC_POSE",
        "kp": 150,
        "damping_ratio": 1,
        "damping_ratio_limits": [0, 10],
    }
    assert (arm(config)["input_type"], arm(config)["input_ref_frame"]) == ("delta", "world")
    assert arm(config)["gripper"] == {"type": "GRIP"}
    assert not {"control_delta", "damping", "damping_limits"} & set(arm(config))


@given(
    kp=st.floats(1, 1000),
    delta=st.booleans(),
    kind=st.sampled_from(ARM_CONTROLLERS),
    extra=st.dictionaries(st.sampled_from(["policy_freq", "kp_limits", "qpos_limits"]), st.integers(0, 100)),
)
@settings(max_examples=30, deadline=None)
def test_values_are_kept_and_the_file_s_own_are_not_touched(kp, delta, kind, extra):
    old = {"type": kind, "kp": kp, "control_delta": delta, **extra}
    before = copy.deepcopy(old)
    [config] = upgraded(old, ["Panda"])
    assert old == before
    assert arm(config).items() >= {"type": kind, "kp": kp, **extra}.items()
    assert arm(config)["input_type"] == ("delta" if delta else "absolute")
    assert upgraded(config, ["Panda"]) == [config]
    json.dumps(config)


def test_each_robot_has_its_own():
    stiff = {**IN_1_4, "kp": 300}
    both = upgraded(IN_1_4, ["Panda", "Sawyer"])
    assert [arm(config)["kp"] for config in both] == [150, 150]
    assert [arm(config)["kp"] for config in upgraded([IN_1_4, stiff], ["Panda", "Panda"])] == [150, 300]
    [two_arms] = upgraded(IN_1_4, ["Baxter"])
    assert arm(two_arms, "right") == arm(two_arms, "left")


def test_settings_of_1_5_stay():
    [default] = upgraded(None, ["Panda"])
    assert (arm(default)["type"], arm(default)["input_type"]) == ("OSC_POSE", "delta")
    nested = {"type": "BASIC", "body_parts": {"arms": {"right": arm(default)}}}
    assert upgraded(nested, ["Panda"]) == [default]


def test_absolute_actions_are_poses_in_the_world():
    config = upgraded(IN_1_4, ["Panda", "Panda"])
    for changed, original in zip(absolute(config), config, strict=True):
        assert (arm(changed)["input_type"], arm(changed)["input_ref_frame"]) == ("absolute", "world")
        assert arm(original)["input_type"] == "delta"


@pytest.mark.parametrize(
    ("configs", "robots", "message"),
    [
        ({**IN_1_4, "type": "OSC_POS"}, ["Panda"], "unknown controller 'OSC_POS' in FILE: did you mean OSC_POSE"),
        (
            {"type": "MAGIC"},
            ["Panda"],
            "unknown controller 'MAGIC' in FILE: choose from IK_POSE, .*OSC",
        ),
        ({"type": "BASIK", "body_parts": {}}, ["Panda"], "unknown controller 'BASIK' in FILE: did you mean BASIC"),
        (
            {"type": "BASIC", "body_parts": {"right": {"type": "OSC"}}},
            ["Panda"],
            "unknown controller 'OSC' in FILE: ",
        ),
        ({"kp": 150}, ["Panda"], "unknown controller 'None' in FILE: choose from"),
        ("OSC_POSE", ["Panda"], "FILE: controller settings are 'OSC_POSE'; expected an object with a type"),
        (IN_1_4, ["Pandar"], "unknown robot 'Pandar' in FILE: did you mean Panda"),
        ([IN_1_4], ["Panda", "Panda"], "FILE has controller settings for 1 of 2 robots"),
    ],
)
def test_what_does_not_exist_is_named(configs, robots, message):
    with pytest.raises(InputError, match=message):
        upgraded(configs, robots, "FILE")


def test_only_poses_can_be_absolute():
    with pytest.raises(InputError, match="absolute actions need the controller OSC_POSE; FILE has JOINT_VELOCITY"):
        absolute(upgraded({"type": "JOINT_VELOCITY"}, ["Panda"]), "FILE")
