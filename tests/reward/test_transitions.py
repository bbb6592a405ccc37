"""What was tried and what came of it: rows in fixed memory, and rows completed when the next condition is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from action_diffusion.errors import InputError
from action_diffusion.training.reward.experience import Acted, Experience, Reward
from action_diffusion.training.reward.transitions import Transitions, mixed


def rows(first: int, n: int) -> dict[str, torch.Tensor]:
    number = torch.arange(first, first + n, dtype=torch.float32)
    return {"condition": number[:, None].expand(n, 3), "reward": number}


def test_the_newest_rows_replace_the_oldest():
    kept = Transitions(4)
    kept.add(rows(0, 3))
    kept.add(rows(3, 3))
    assert len(kept) == 4
    assert kept.newest(10)["reward"].tolist() == [2, 3, 4, 5]
    assert set(kept.sample(100, torch.Generator().manual_seed(0))["reward"].tolist()) == {2, 3, 4, 5}


def test_rows_stay_together():
    kept = Transitions(100)
    kept.add(rows(0, 50))
    found = kept.sample(64)
    assert torch.equal(found["condition"][:, 0], found["reward"])


def test_what_is_not_finite_is_refused():
    kept = Transitions(4)
    with pytest.raises(InputError, match="reward of a trial holds NaN"):
        kept.add({"condition": torch.zeros(1, 3), "reward": torch.tensor([float("nan")])})
    assert len(kept) == 0


def test_half_comes_from_each_source():
    offline, online = Transitions(10), Transitions(10)
    offline.add(rows(0, 5))
    online.add(rows(100, 5))
    found = mixed([offline, online], 8)["reward"]
    assert (found < 50).sum() == (found >= 100).sum() == 4
    assert len(mixed([offline, Transitions(10)], 8)["reward"]) == 8


@pytest.mark.parametrize(
    ("kind", "rewards", "total", "discount"),
    [
        ("success", [0.0, 0.5, 0.9, 0.2], -(1 + 0.9 + 0.81 + 0.729) / 4, 0.9**4),
        ("success", [0.5, 1.0], -1 / 4, 0.0),
        ("dense", [0.0, 0.5], -(1 + 0.45) / 4, 0.9**2),
        ("dense", [1.0], 0.0, 0.0),
    ],
)
def test_a_reward_is_what_sooner_is_better_by(kind, rewards, total, discount):
    found = Reward(kind, 0.9).of(rewards, 4)
    assert found == pytest.approx((total, discount))


class Counting:
    """A number that every step adds an action to; done with a reward of 1 where it is 10, or cut off after 12 steps."""

    control_rate, max_steps = 10.0, 12
    action_shape: tuple[int, ...] = (1,)

    def reset(self, seed: int) -> None:
        self.number, self.steps = float(seed % 2), 0

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        self.number += float(action[0])
        self.steps += 1
        reward = float(self.number >= 10)
        return reward, reward >= 1 or self.steps >= self.max_steps

    def observe(self, keys):
        return {key: np.array([self.number], np.float32) for key in keys}

    def render(self, size: int = 256) -> np.ndarray:
        return np.zeros((size, size, 3), np.uint8)

    def close(self) -> None:
        pass


class Spec:
    n_obs_steps, n_action_steps = 1, 4


def experience(speed: float, n_envs: int = 2) -> tuple[Experience, Any]:
    trials = Experience(
        make_env=Counting, spec=Spec(), keys=["state"], seeds=itertools.count(), n_envs=n_envs, reward=Reward("success")
    )

    def act(obs):
        condition = torch.as_tensor(obs["state"][:, 0])
        return Acted(np.full((len(condition), 4, 1), speed, np.float32), {"condition": condition})

    return trials, act


def test_a_row_leads_from_a_condition_to_the_one_after_its_chunk():
    trials, act = experience(speed=0.5)
    assert trials.turn(act).rows == {}
    found = trials.turn(act).rows
    assert found["condition"].flatten().tolist() == [0, 1]
    assert found["next_condition"].flatten().tolist() == [2, 3]
    assert found["discount"].tolist() == pytest.approx([0.99**4] * 2)


def test_a_success_ends_its_row_and_begins_another_start():
    trials, act = experience(speed=1.0, n_envs=1)  # from 0: 4, 8, then 10 after two steps of the third chunk
    turns = [trials.turn(act) for _ in range(3)]
    assert [turn.steps for turn in turns] == [4, 4, 2]
    last = turns[2].rows
    assert last["condition"].flatten().tolist() == [4, 8]
    assert last["discount"][1] == 0
    assert last["reward"][1] == pytest.approx(-1 / 4)
    assert [episode.seed for episode in turns[2].episodes] == [0]
    assert trials.turn(act).rows == {}, "the first chunk of another episode"


def test_what_a_time_limit_hides_is_left_out():
    trials, act = experience(speed=0.1, n_envs=1)
    turns = [trials.turn(act) for _ in range(4)]
    assert [len(turn.rows.get("reward", ())) for turn in turns] == [0, 1, 1, 0]
    assert [episode.score for episode in turns[2].episodes] == [0]
