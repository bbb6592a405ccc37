"""A robot without a simulator: two cameras and 7-dimensional actions, from a buffer to held-out errors and plots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from action_diffusion import policy as policy_package
from action_diffusion.cli import main
from action_diffusion.datasets.replay_buffer import ReplayBuffer

EPISODES, LENGTH = 5, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    random = np.random.default_rng(0)
    n = EPISODES * LENGTH
    joints = np.cumsum(random.normal(size=(n, 7)), axis=0).astype(np.float32) * 0.05
    joints[:, 6] = 0.04  # a gripper that never moves
    arrays = {
        "front": random.integers(0, 256, (n, 24, 32, 3), dtype=np.uint8),
        "wrist": random.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8),
        "joints": joints,
        "action": (joints + 0.01).astype(np.float32),
        "reward": np.zeros(n, np.float32),
    }
    path = tmp_path_factory.mktemp("custom") / "robot.zarr"
    ReplayBuffer.from_arrays(arrays, np.arange(1, EPISODES + 1) * LENGTH).save(path)
    return path


SMALL = [
    "device=cpu",
    "encoder=resnet18_small",
    "policy.denoiser.channels=[8,16]",
    "policy.encoder.keypoints=4",
    "policy.encoder.feature_dim=8",
    "train.max_steps=4",
    "train.batch_size=4",
    "train.tensorboard=false",
    "dataset.val_fraction=0.2",
]


def test_keys_cameras_and_shapes_come_from_the_buffer(data, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "task=custom", f"data={data}", f"output_dir={output}", *SMALL]) == 0
    spec = json.loads((output / "bundle" / "spec.json").read_text())
    assert set(spec["observations"]) == {"front", "wrist", "joints"}
    assert spec["camera_order"] == ["front", "wrist"]
    assert spec["observations"]["wrist"]["shape"] == [16, 16, 3]
    assert spec["action"]["shape"] == [7]
    results = json.loads((output / "evaluation" / "results.json").read_text())
    assert "success_rate" not in results
    assert "mean_score" not in results
    assert results["action_error"] > 0
    assert len(results["errors"]) == 7
    assert "<svg" in (output / "evaluation" / "report.html").read_text()
    assert "action_error" in capsys.readouterr().out
    policy = policy_package.load(output / "bundle", verify=True)
    actions = policy.predict(
        {
            "front": np.zeros((2, 24, 32, 3), np.uint8),
            "wrist": np.zeros((2, 16, 16, 3), np.uint8),
            "joints": np.zeros((2, 7), np.float32),
        }
    )["action"]
    assert actions.shape == (8, 7)
    np.testing.assert_allclose(actions[:, 6], 0.05, atol=1e-6)  # a constant dimension stays what it was
    assert main(["evaluate", f"bundle={output / 'bundle'}", f"output_dir={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["action_error"] == pytest.approx(results["action_error"])


def test_a_user_s_task_chooses_keys_and_units(data, tmp_path):
    folder = tmp_path / "mine" / "task"
    folder.mkdir(parents=True)
    (folder / "my_arm.yaml").write_text(
        f"""# @package _global_
task:
  name: my_arm
  data: {data}
  env: null
  control_rate: 20.0
  n_obs_steps: 1
  horizon: 8
  n_action_steps: 4
  observations:
    wrist: {{source: wrist, kind: image}}
    arm: {{source: joints, columns: [0, 1, 2], kind: state, unit: rad}}
  action: {{source: action, unit: rad}}
"""
    )
    output = tmp_path / "run"
    words = ["train", "task=my_arm", "--config-dir", str(tmp_path / "mine"), f"output_dir={output}", *SMALL]
    assert main([*words, "policy.encoder.crop=[12,12]"]) == 0
    spec = json.loads((output / "bundle" / "spec.json").read_text())
    assert spec["observations"]["arm"]["shape"] == [3]
    assert spec["observations"]["arm"]["unit"] == "rad"
    assert spec["control_rate"] == 20.0
    assert policy_package.load(output / "bundle").predict(
        {"wrist": np.zeros((1, 16, 16, 3), np.uint8), "arm": np.zeros((1, 3), np.float32)}
    )["action"].shape == (4, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.observations={cam:{source:fronts,kind:image}}"], "did you mean front"),
        (["task.observations={cam:{source:joints,kind:image}}"], "images must be [N, H, W, 3]"),
        (["task.observations={q:{source:joints,columns:[9]}}"], "columns [9] do not exist"),
        (["task.action={source:actions}"], "did you mean action"),
        (["task.observations={q:{source:joints,kind:vector}}"], "unknown kind of observation 'q'"),
    ],
)
def test_what_the_buffer_lacks_is_named(data, tmp_path, capsys, words, message):
    assert main(["train", "task=custom", f"data={data}", f"output_dir={tmp_path / 'run'}", *SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
