"""Collected demonstrations are the expert's, reproducible, and never lost or overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs import demonstration
from action_diffusion.envs.collect import collect
from action_diffusion.envs.pusht.expert import PushTExpert
from action_diffusion.envs.pusht.simulator import PushT
from action_diffusion.errors import InputError

EMBEDDED = Path(__file__).parents[2] / "datasets" / "embedded" / "pusht_expert.zarr.zip"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReplayBuffer, dict[str, Any]]:
    path = tmp_path_factory.mktemp("collect") / "two.zarr.zip"
    summary = collect(env_name="pusht", episodes=2, seed=1, output=path)
    return ReplayBuffer.open(path), summary


@pytest.mark.slow
def test_buffer_holds_what_the_summary_says(collected: tuple[ReplayBuffer, dict[str, Any]]) -> None:
    buffer, summary = collected
    assert buffer.n_episodes == summary["episodes"] == 2
    assert buffer.n_steps == summary["steps"]
    assert "incomplete" not in summary
    assert {key: (buffer[key].shape[1:], str(buffer[key].dtype)) for key in buffer.keys} == {
        "state": ((5,), "float32"),
        "action": ((2,), "float32"),
        "reward": ((), "float32"),
    }
    assert len(buffer.attrs["seeds"]) == 2
    assert buffer.attrs["source"] == "scripted expert"
    assert all(episode["reward"].max() == 1.0 for episode in buffer.episodes())


def test_recorded_actions_are_the_experts_undisturbed(collected: tuple[ReplayBuffer, dict[str, Any]]) -> None:
    buffer, _ = collected
    for seed, episode in zip(buffer.attrs["seeds"], buffer.episodes(), strict=True):
        expert = PushTExpert(seed=seed)
        expert.reset()  # for the way to where the recording begins
        expert.reset()
        for state, action in zip(episode["state"], episode["action"], strict=True):
            np.testing.assert_array_equal(expert.act({"state": state}), action)


@pytest.mark.slow
def test_an_episode_from_a_usual_start_replays_exactly() -> None:
    env = PushT(max_steps=500)
    episodes = ((start, demonstration.episode(env, "pusht", start)) for start in range(8))
    start, episode = next(one for one in episodes if np.allclose(one[1]["state"][0], begin_of(one[0]), atol=1e-3))
    env.reset(start)
    for state, action, reward in zip(episode["state"], episode["action"], episode["reward"], strict=True):
        np.testing.assert_array_equal(env.observe(["state"])["state"], state)
        assert env.step(action)[0] == pytest.approx(reward, abs=1e-6)


@pytest.mark.slow
def test_episodes_begin_in_all_three_ways() -> None:
    begins = [demonstration.episode(PushT(max_steps=500), "pusht", start) for start in range(8)]
    first = [episode["state"][0] for episode in begins if "state" in episode]
    usual = [np.allclose(state, begin_of(start), atol=1e-3) for start, state in enumerate(first)]
    near = [np.linalg.norm(state[2:4] - 256) < 90 for state in first]
    assert any(usual)
    assert not all(usual)
    assert any(near)


@pytest.mark.slow
def test_episodes_can_begin_where_a_policy_gets_to(policy: Any) -> None:
    first, again = (demonstration.episode(PushT(max_steps=500), "pusht", 3, policy) for _ in range(2))
    assert not np.allclose(first["state"][0, :2], begin_of(3)[:2], atol=5.0)
    assert first["reward"].max() == 1.0
    np.testing.assert_array_equal(first["state"], again["state"])


def begin_of(start: int) -> np.ndarray:
    env = PushT()
    env.reset(start)
    return env.observe(["state"])["state"]


class Runner:
    """Stands in for an episode: the score is given by the start."""

    def __init__(self, scores: dict[int, float], interrupt_at: int | None = None) -> None:
        self.scores, self.interrupt_at = scores, interrupt_at

    def __call__(self, env: Any, env_name: str, start: int, *others: Any) -> dict[str, np.ndarray]:
        if start == self.interrupt_at:
            raise KeyboardInterrupt
        reward = np.full(4, self.scores.get(start, 1.0), np.float32)
        return {"state": np.full((4, 5), start, np.float32), "action": np.zeros((4, 2), np.float32), "reward": reward}


def test_failures_are_discarded_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "episode", Runner({0: 0.5, 2: 0.979}))
    summary = collect(env_name="pusht", episodes=3, output=tmp_path / "a.zarr")
    assert summary["discarded"] == 2
    assert ReplayBuffer.open(tmp_path / "a.zarr").attrs["seeds"] == [1, 3, 4]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "episode", Runner({}, interrupt_at=2))
    summary = collect(env_name="pusht", episodes=5, output=tmp_path / "a.zarr")
    assert summary["incomplete"] == "interrupted: 2 of 5 episodes kept"
    assert ReplayBuffer.open(tmp_path / "a.zarr").n_episodes == 2


def test_attempts_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "episode", Runner(dict.fromkeys(range(1, 100), 0.0)))
    summary = collect(env_name="pusht", episodes=2, output=tmp_path / "a.zarr", max_attempts=4)
    assert summary["incomplete"] == "attempts used up: 1 of 2 episodes kept"
    with pytest.raises(InputError, match="nothing collected: 4 episodes scored below"):
        collect(env_name="pusht", episodes=2, seed=1, output=tmp_path / "b.zarr", max_attempts=4)
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_name": "push"}, "did you mean pusht"),
        ({"agent_name": "exprt"}, "did you mean expert"),
        ({"episodes": 0}, "at least one"),
        ({"seed": -1}, "starts 0 to 99999"),
        ({"seed": 99_990}, "evaluations begin at 100000"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        collect(**{"env_name": "pusht", "episodes": 1, "output": tmp_path / "a.zarr", **settings})


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(InputError, match="exists"):
        collect(env_name="pusht", episodes=1, output=tmp_path / "a.zarr")


def test_the_embedded_demonstrations_are_what_this_code_collects(tmp_path: Path) -> None:
    embedded = ReplayBuffer.open(EMBEDDED)
    assert EMBEDDED.stat().st_size < 2_000_000
    assert embedded.n_episodes >= 300
    assert max(embedded.attrs["seeds"]) < 100_000
    collect(env_name="pusht", episodes=1, output=tmp_path / "a.zarr")
    first, again = embedded.episode(0), ReplayBuffer.open(tmp_path / "a.zarr").episode(0)
    for key in ("state", "action"):
        np.testing.assert_allclose(first[key], again[key], atol=1e-3)


@pytest.mark.slow
def test_any_simulator_with_an_expert_can_be_collected_in(tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="needs the extra [robomimic]")
    collect(env_name="lift", episodes=1, output=tmp_path / "a.zarr", cameras=["agentview_image"])
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert buffer["states"].dtype == np.float64
    assert buffer["agentview_image"].shape == (buffer.n_steps, 84, 84, 3)
    assert buffer["action"].shape == (buffer.n_steps, 7)
    assert buffer.attrs["env_args"]["env_name"] == "Lift"
    assert buffer["reward"][-1] == 1.0


@pytest.mark.slow
def test_what_is_collected_does_not_depend_on_the_processes(tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="needs the extra [robomimic]")
    for workers in (1, 2):
        collect(env_name="lift", episodes=2, output=tmp_path / f"{workers}.zarr", workers=workers)
    one, two = (ReplayBuffer.open(tmp_path / f"{workers}.zarr") for workers in (1, 2))
    assert dict(one.attrs) == dict(two.attrs)
    for key in one.keys:
        np.testing.assert_array_equal(one[key][:], two[key][:])
