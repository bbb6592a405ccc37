"""robomimic's tasks from data to a policy that is evaluated, as a user runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("robosuite", reason="needs the extra [robomimic]")

from action_diffusion import policy as policies
from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs.collect import collect
from action_diffusion.envs.robosuite.tasks import Manipulation
from action_diffusion.options.configuration import load
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.registry import build
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.training.evaluation.rollouts import evaluate

SMALL = [
    "device=cpu",
    "policy.denoiser.channels=[8,16]",
    "policy.denoiser.time_dim=16",
    "policy.sampler.num_inference_steps=2",
    "train.batch_size=8",
    "train.max_steps=4",
    "train.rollout_every=0",
    "train.tensorboard=false",
    "dataset.val_windows=8",
    "evaluation.n_episodes=1",
    "evaluation.n_videos=1",
    "evaluation.policy_batch=1",
]
TASKS = ("lift_image", "can_state", "square_state", "transport_image", "tool_hang_state")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_policy_is_evaluated_in_each_of_the_five(task, tmp_path):
    config = load("train", [f"task={task}", "data=x", *SMALL])
    features = config["policy"].get("features") or {}
    env = Manipulation(task=config["task"]["env"]["name"], max_steps=8)
    env.reset(0)
    keys = list(config["task"]["observations"])
    seen = env.observe(keys)
    random = np.random.default_rng(0)
    sizes = {key: len(value) for key, value in seen.items() if value.ndim == 1}
    sizes |= {key: build("features", options, n=sizes[key]).output_dim for key, options in features.items()}
    states = {key: fit(random.normal(size=(9, size))) for key, size in sizes.items()}
    spec = PolicySpec(
        observations={
            key: ObservationSpec(shape=value.shape, dtype=str(value.dtype), kind="image" if value.ndim > 1 else "state")
            for key, value in seen.items()
        },
        action=ActionSpec(shape=env.action_shape),
        n_obs_steps=2,
        horizon=16,
        n_action_steps=8,
        control_rate=20.0,
        normalizer={**states, "action": fit(np.array([[-1.0], [1.0]]).repeat(env.action_shape[0], axis=1))},
    )
    torch.manual_seed(0)
    results = evaluate(
        policy=build_policy(config["policy"], spec).eval(),
        env_name=task,
        make_env=lambda: env,
        keys=keys,
        n_episodes=1,
        n_envs=1,
        policy_batch=1,
        n_videos=1,
        output_dir=tmp_path,
        settings={},
    )
    assert results["scores"] == [0.0]
    assert list((tmp_path / "videos").glob("*.mp4"))


@pytest.mark.slow
def test_scripted_lift_with_cameras_trains_and_is_evaluated(tmp_path):
    collect(
        env_name="lift",
        episodes=2,
        output=tmp_path / "lift.zarr",
        cameras=["agentview_image", "robot0_eye_in_hand_image"],
    )
    words = [f"data={tmp_path / 'lift.zarr'}", f"output_dir={tmp_path / 'run'}", "task.env.max_steps=16"]
    assert main(["train", "task=lift_image", *words, *SMALL, "evaluation.n_videos=0"]) == 0
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert results["task"] == "lift_image"
    assert results["demonstrations"] == "scripted expert"
    env = policies.load(tmp_path / "run" / "bundle").spec.env
    assert env is not None
    assert env["env_args"] == ReplayBuffer.open(tmp_path / "lift.zarr").attrs["env_args"]


@pytest.mark.slow
def test_people_s_lift_episodes_convert_by_their_states_and_train(tmp_path, capsys):
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: no demonstrations by people")
    data, run = tmp_path / "human.zarr", tmp_path / "run"
    source = Path(folder) / "robosuite_lift_human.hdf5"
    assert main(["data", "convert", f"in={source}", f"out={data}", "workers=1"]) == 0
    words = [f"data={data}", f"output_dir={run}", *SMALL, "task.env.max_steps=16"]
    assert main(["train", "task=lift_state", *words]) == 0
    spec = json.loads((run / "bundle" / "spec.json").read_text())
    assert spec["env"]["env_args"]["env_version"].startswith("1.4")
    assert spec["observations"]["object"]["shape"] == [10]
    assert "report" in capsys.readouterr().out


@pytest.mark.slow
def test_an_observation_that_the_file_lacks_is_named(tmp_path, capsys):
    collect(env_name="lift", episodes=1, output=tmp_path / "lift.zarr")
    assert main(["train", "task=lift_image", f"data={tmp_path / 'lift.zarr'}", *SMALL]) == 2
    error = capsys.readouterr().err
    assert "unknown key of the buffer for observation 'robot0_eye_in_hand_image'" in error
    assert error.count("\n") == 1
