"""Observations that are several of a simulator's, one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from action_diffusion import envs
from action_diffusion.errors import InputError


def test_a_joined_observation_is_its_parts_one_after_the_other():
    env = envs.make("pusht", max_steps=5, joined={"obs": ["keypoint", "agent_pos"]})
    env.reset(3)
    seen = env.observe(["obs", "keypoint", "agent_pos", "state"])
    assert list(seen) == ["obs", "keypoint", "agent_pos", "state"]
    np.testing.assert_array_equal(seen["obs"], [*seen["keypoint"].ravel(), *seen["agent_pos"]])
    assert seen["obs"].dtype == np.float32
    assert env.max_steps == 5
    env.close()


def test_a_part_that_there_is_not_is_named():
    env = envs.make("pusht", joined={"obs": ["keypoints"]})
    env.reset(0)
    with pytest.raises(InputError, match="unknown PushT observation 'keypoints'"):
        env.observe(["obs"])
    env.close()
