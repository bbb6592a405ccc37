"""Evaluations end to end: on PushT with rollouts, without a simulator on two cameras and seven joints."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rollouts import NoisyPolicy
from trouble import Trouble

from action_diffusion.envs import make
from action_diffusion.errors import InputError
from action_diffusion.training.evaluation.results import ranks
from action_diffusion.training.evaluation.rollouts import (
    compare,
    evaluate,
    evaluate_offline,
    read_results,
    summarise_seeds,
)

TO, TA, HORIZON = 2, 4, 8
NAMES = {
    "env",
    "task",
    "n_episodes",
    "mean_score",
    "success_rate",
    "success_interval",
    "mean_interval",
    "scores",
    "seeds",
    "settings",
    "versions",
    "seconds",
    "demonstrations",
    "simulator_failures",
    "score_definition",
}


class Pusher:
    """Walks about the block, differently in every episode."""

    spec = SimpleNamespace(n_obs_steps=TO, n_action_steps=TA)

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise_generator: list[torch.Generator],
        generator: list[torch.Generator],
    ) -> dict[str, np.ndarray]:
        block = obs["state"][:, -1:, 2:4]
        noise = torch.stack([torch.randn(HORIZON, 2, generator=row) for row in noise_generator])
        return {"action_pred": (block + 60 * noise.numpy()).clip(10, 500)}


def run(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "policy": Pusher(),
        "env_name": "pusht_state",
        "make_env": lambda: make("pusht", max_steps=24),
        "keys": ["state"],
        "n_episodes": 5,
        "n_videos": 0,
        "output_dir": tmp_path,
        "settings": {},
        "progress": Progress(disable=True),
    }
    return evaluate(**(arguments | settings))


@pytest.mark.slow
def test_lost_simulators_and_the_demonstrations_are_named(tmp_path: Path) -> None:
    make_env = functools.partial(Trouble, what="raise", seed=105, times=9, folder=tmp_path)
    with pytest.warns(UserWarning, match="seed 105: the simulator failed"):
        results = run(
            tmp_path / "out",
            policy=NoisyPolicy(),
            make_env=make_env,
            seed=104,
            n_episodes=2,
            workers=2,
            demonstrations="scripted expert",
        )
    assert [failure["seed"] for failure in results["simulator_failures"]] == [105, 105, 105]
    assert results["scores"][1] == 0.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the contact solver gave up" in page
    assert "learnt from: scripted expert" in page


def test_it_writes_results_report_and_videos(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n')
    old = tmp_path / "videos" / "seed_7.mp4"
    old.parent.mkdir()
    old.touch()
    settings = {"bundle": "somewhere", "sampler": {"n_steps": 16}}
    results = run(tmp_path, n_videos=3, settings=settings, metrics_file=metrics)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results == read_results(tmp_path / "results.json")
    assert results.keys() == NAMES
    assert results["task"] == "pusht_state"
    assert results["seeds"] == [100_000, 100_001, 100_002, 100_003, 100_004]
    assert results["n_episodes"] == len(results["scores"]) == 5
    assert results["mean_score"] == pytest.approx(np.mean(results["scores"]))
    assert results["mean_interval"][0] <= results["mean_score"] <= results["mean_interval"][1]
    assert results["success_rate"] == 0
    assert results["success_interval"] == pytest.approx([0, 0.4345], abs=1e-4)
    assert results["settings"] == settings | {
        "n_obs_steps": TO,
        "n_action_steps": TA,
        "seed": 100_000,
        "n_envs": 10,
        "policy_batch": 10,
    }
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    page = (tmp_path / "report.html").read_text()
    assert "Learning curves" in page
    assert "They do not cover training" in page
    videos = sorted((tmp_path / "videos").iterdir())
    assert len(videos) == 3
    assert old not in videos
    best = results["seeds"][int(np.argmax(results["scores"]))]
    with av.open(str(tmp_path / "videos" / f"seed_{best}.mp4")) as video:
        assert len(list(video.decode(video=0))) == 25
        assert video.streams.video[0].average_rate == 10


def test_results_do_not_depend_on_the_number_of_environments(tmp_path: Path) -> None:
    one, two = (run(tmp_path, n_envs=n_envs, n_episodes=4, seed=3) for n_envs in (1, 3))
    for results in (one, two):
        del results["seconds"], results["settings"]["n_envs"]
    assert one == two


def test_a_simulator_that_does_not_repeat_itself_gives_no_video(tmp_path: Path) -> None:
    class Drifting:
        control_rate, max_steps, action_shape = 10.0, 4, (2,)
        resets = 0

        def reset(self, seed: int) -> None:
            Drifting.resets += 1

        def step(self, action: np.ndarray) -> tuple[float, bool]:
            return 0.1 * Drifting.resets, False

        def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
            return {"state": np.zeros(5)}

        def render(self, size: int = 256) -> np.ndarray:
            return np.zeros((size, size, 3), np.uint8)

        def close(self) -> None:
            pass

    with pytest.warns(UserWarning, match="no video of seed 100000: the simulator is not deterministic"):
        run(tmp_path, make_env=Drifting, n_episodes=1, n_videos=1)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", "videos"}
    assert not list((tmp_path / "videos").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_episodes": 0}, "n_episodes is 0"),
        ({"n_videos": -1}, "n_videos is -1"),
        ({"n_envs": 0}, "n_envs is 0"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"settings": {"device": torch.device("cpu")}}, "plain data"),
        ({"settings": {"lr": math.nan}}, "plain data"),
        ({"metrics_file": "/nowhere/metrics.jsonl"}, "/nowhere/metrics.jsonl"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_diverged_policy_names_the_seed(tmp_path: Path) -> None:
    class Diverged(Pusher):
        def predict(self, obs: Any, **generators: Any) -> dict[str, np.ndarray]:
            return {"action_pred": super().predict(obs, **generators)["action_pred"] * np.nan}

    with pytest.raises(InputError, match=r"seed 100000.*NaN"):
        run(tmp_path, policy=Diverged())


@given(n=st.integers(1, 60), count=st.integers(0, 70))
def test_ranks_are_spread_evenly_with_both_ends(n: int, count: int) -> None:
    chosen = ranks(n, count, first="Best", last="Worst")
    places = [place for _, place in chosen]
    assert len(places) == min(n, count)
    assert places == sorted(set(places))
    if count > 1 and n > 1:
        assert chosen[0] == ("Best", 0)
        assert chosen[-1] == ("Worst", n - 1)
        gaps = np.diff(places)
        assert gaps.max() - gaps.min() <= 1


def measured(scores: Sequence[float], task: str = "pusht_state", first: int = 0) -> dict[str, Any]:
    return {
        "task": task,
        "n_episodes": len(scores),
        "scores": list(scores),
        "seeds": list(range(first, first + len(scores))),
        "mean_score": float(np.mean(scores)),
        "success_rate": float(np.mean([score >= 1 for score in scores])),
    }


def test_compare_on_the_same_starts() -> None:
    found = compare(measured([1.0, 0.9, 0.5, 0.8]), measured([0.9, 0.8, 0.4, 0.8]))
    assert found["mean_difference"] == pytest.approx(0.075)
    assert 0 <= found["mean_interval"][0] < 0.075 < found["mean_interval"][1] <= 0.1001
    assert found["success_difference"] == 0.25
    assert (found["higher"], found["equal"], found["lower"]) == (3, 1, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (measured([0.5, 0.5], first=7), "2 from seed 0 and 2 from seed 7"),
        (measured([0.5, 0.5, 0.5]), "2 from seed 0 and 3 from seed 0"),
        (measured([0.5, 0.5], task="pusht_image"), "pusht_state and pusht_image"),
    ],
)
def test_different_starts_or_tasks_do_not_compare(other: dict[str, Any], message: str) -> None:
    for function in (compare, lambda a, b: summarise_seeds([a, b])):
        with pytest.raises(InputError, match=message):
            function(measured([0.1, 0.2]), other)


def test_several_training_seeds() -> None:
    found = summarise_seeds([measured([1.0, 0.8]), measured([0.6, 0.8]), measured([1.0, 1.0])])
    assert (found["n_seeds"], found["n_episodes"]) == (3, 2)
    assert found["mean_score"] == pytest.approx({"mean": 2.6 / 3, "sd": 0.152753, "min": 0.7, "max": 1.0}, abs=1e-6)
    assert found["success_rate"]["max"] == 1.0
    with pytest.raises(InputError, match="no results"):
        summarise_seeds([])


@pytest.mark.parametrize("text", ["", "[]", '{"task": "custom", "n_windows": 3}'])
def test_results_that_are_not(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json"):
        read_results(tmp_path / "results.json")
    with pytest.raises(InputError, match="nothing"):
        read_results(tmp_path / "nothing")


class Biased:
    """Knows the demonstration, which it gets as an observation, and is off by a little in each dimension."""

    spec = SimpleNamespace(n_obs_steps=TO, n_action_steps=TA)
    bias = np.array([0.1, 0, 0, 0, 0, -0.3, 0.5])

    def predict(self, obs: Mapping[str, np.ndarray], **generators: list[torch.Generator]) -> dict[str, np.ndarray]:
        assert obs["front"].shape[1:] == obs["wrist"].shape[1:] == (TO, 8, 8, 3)
        assert len({id(row) for row in generators["noise_generator"]}) == len(obs["front"])
        return {"action_pred": obs["answer"] + self.bias}


def held_out(n: int = 3, size: int = 5, seed: int = 0) -> list[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    batches = []
    for _ in range(n):
        action = random.uniform(-1, 1, size=(size, HORIZON, 7))
        action[0, 1:3, :6] = [[-1.0], [1.0]]  # so that the range is 2
        action[..., 6] = 0.25  # a gripper that never moves
        mask = np.ones((size, HORIZON), bool)
        mask[-1, 3:] = False
        action[-1, 3:] = 77.0
        images = random.integers(0, 256, size=(2, size, TO, 8, 8, 3), dtype=np.uint8)
        batches.append(({"front": images[0], "wrist": images[1], "answer": action}, action, mask))
    return batches


def run_offline(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "policy": Biased(),
        "batches": held_out(),
        "output_dir": tmp_path,
        "settings": {"bundle": "somewhere"},
        "n_plots": 1,
        "progress": Progress(disable=True),
    }
    return evaluate_offline(**(arguments | settings))


@pytest.mark.slow
def test_offline_two_cameras_and_seven_dimensions(tmp_path: Path) -> None:
    names = ["x", "y", "z", "roll", "pitch", "yaw", "grip"]
    results = run_offline(tmp_path, names=names, task="custom", n_plots=3)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert not {"success_rate", "mean_score", "scores"} & results.keys()
    assert results["task"] == "custom"
    assert results["n_windows"] == 15
    assert results["n_steps"] == 3 * (4 * TA + 2)  # the last window of a batch ends two steps after now
    for name, bias in zip(names, Biased.bias, strict=True):
        error = results["errors"][name]
        assert error["mae"] == pytest.approx(abs(bias))
        assert error["rmse"] == pytest.approx(abs(bias))
        assert error["range"] == (0 if name == "grip" else 2)
        assert error["relative_mae"] == (None if name == "grip" else pytest.approx(abs(bias) / 2))
    assert results["action_error"] == pytest.approx(0.9 / 7)
    assert results["action_error_relative"] == pytest.approx((0.05 + 0.15) / 6)
    assert results["steps_ahead"] == [-1, 0, 1, 2, 3, 4, 5, 6]
    assert np.array(results["mae_ahead"]) == pytest.approx(np.tile(abs(Biased.bias), (HORIZON, 1)))
    assert results["relative_ahead"] == pytest.approx([0.2 / 6] * HORIZON)
    page = (tmp_path / "report.html").read_text()
    assert "no success rate" in page
    assert "Predicted and demonstrated" in page
    assert not (tmp_path / "videos").exists()


@pytest.mark.slow
def test_offline_rmse_and_steps_differ_where_errors_do(tmp_path: Path) -> None:
    class Growing(Biased):
        bias = np.arange(HORIZON)[:, None] * np.ones(7)

    results = run_offline(tmp_path, policy=Growing())
    steps = np.array([1, 2, 3, 4] * 4 + [1, 2])
    assert results["errors"]["action 0"]["mae"] == pytest.approx(steps.mean())
    assert results["errors"]["action 0"]["rmse"] == pytest.approx(math.sqrt((steps**2).mean()))
    assert [row[0] for row in results["mae_ahead"]] == pytest.approx(list(range(HORIZON)))


@pytest.mark.slow
def test_offline_noise_does_not_depend_on_batches(tmp_path: Path) -> None:
    class Noisy(Biased):
        def predict(self, obs: Any, **generators: Any) -> dict[str, np.ndarray]:
            noise = [torch.randn(HORIZON, 7, generator=row) for row in generators["noise_generator"]]
            return {"action_pred": obs["answer"] + torch.stack(noise).numpy()}

    whole = held_out(n=1, size=6)
    obs, action, mask = whole[0]
    parts = [({k: v[i : i + 2] for k, v in obs.items()}, action[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    one, two = (run_offline(tmp_path, policy=Noisy(), batches=batches) for batches in (whole, parts))
    assert one["errors"] == two["errors"]
    assert one["errors"] != run_offline(tmp_path, policy=Noisy(), batches=whole, seed=1)["errors"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": []}, "no held-out windows"),
        ({"names": ["x", *"aaabbb"]}, "3 different names for 7"),
        ({"n_plots": 0}, "n_plots is 0"),
        ({"batches": [(obs, action[:, :, :3], mask) for obs, action, mask in held_out()]}, "do not fit together"),
        ({"batches": [(obs, action, mask[:, :3]) for obs, action, mask in held_out()]}, "do not fit together"),
        ({"batches": [(obs, action, mask & False) for obs, action, mask in held_out()]}, "is padding"),
        ({"batches": [(obs, action * np.inf, mask) for obs, action, mask in held_out()]}, "held-out actions hold NaN"),
    ],
)
def test_offline_bad_input(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_offline(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_offline_diverged_policy(tmp_path: Path) -> None:
    class Diverged(Biased):
        bias = np.full(7, np.nan)

    with pytest.raises(InputError, match="the policy's chunks hold NaN"):
        run_offline(tmp_path, policy=Diverged())
