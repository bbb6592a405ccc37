"""A robot without a simulator: two cameras and 7-dimensional actions, from a buffer to held-out errors and plots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from action_diffusion import policy as policy_package
from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.policy.build import fit_normalizer
from action_diffusion.policy.model.features import module_name
from action_diffusion.policy.model.normalizer import Normalizer
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.training.data import describe, learnt_from, prepare

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
    "policy.sampler.num_inference_steps=2",
    "train.max_steps=4",
    "train.batch_size=4",
    "train.tensorboard=false",
    "dataset.val_fraction=0.2",
]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("words", [["drop=[wrist,reward]"], ["task.observations.wrist=null"]])
def test_an_observation_that_is_dropped_is_not_learnt_from(words, data, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "task=custom", f"data={data}", f"output_dir={output}", *SMALL, *words]) == 0
    spec = json.loads((output / "bundle" / "spec.json").read_text())
    assert set(spec["observations"]) == {"front", "joints"}
    assert spec["buffer_columns"]["wrist"] == "left out: drop"
    assert "wrist   left out: drop\n" in capsys.readouterr().err
    assert main(["evaluate", f"bundle={output / 'bundle'}", f"output_dir={tmp_path / 'again'}"]) == 0


def test_an_observation_that_a_task_names_is_dropped_by_its_name(data):
    task = {**load("train", ["task=custom", f"data={data}"])["task"]}
    task["observations"] = {"hand": {"source": "wrist", "kind": "image"}, "joints": {"kind": "state"}}
    spec = describe(task, ReplayBuffer.open(data), {}, ["hand"])
    assert set(spec.observations) == {"joints"}
    assert spec.buffer_columns["wrist"] == "left out: drop"
    with pytest.raises(InputError, match=r"unknown observation 'wrist' in drop of .*: choose from hand, joints"):
        describe(task, ReplayBuffer.open(data), {}, ["wrist"])


def test_a_null_in_a_task_of_named_observations_leaves_the_others():
    config = load("train", ["task=lift_image", "data=x.zarr", "task.observations.robot0_eef_pos=null"])
    assert config["drop"] is None
    assert "robot0_eef_pos" not in config["task"]["observations"]
    assert "robot0_eef_quat" in config["task"]["observations"]


@pytest.mark.slow
def test_several_buffers_are_trained_on_together(data, tmp_path, monkeypatch, capsys):
    """One of them is LeRobot's; the held-out episodes are the same when the policy is evaluated again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more, lerobot, output = tmp_path / "more.zarr", tmp_path / "more", tmp_path / "run"
    ReplayBuffer.from_arrays({**two_episodes(), "extra": np.zeros(2 * LENGTH)}, [LENGTH, 2 * LENGTH]).save(more)
    assert main(["data", "convert", f"in={more}", f"out={lerobot}", "format=lerobot", "video=lossless"]) == 0
    both = f"data=[{data},{lerobot}]"
    words = ["task=custom", both, f"output_dir={output}", *SMALL]
    assert main(["train", *words]) == 2
    assert f"{data} has no column extra, which {lerobot} has" in capsys.readouterr().err
    assert main(["train", *words, "drop=[extra]"]) == 2  # it is not there in both
    assert main(["train", *words, "task.observations={joints:{kind:state},wrist:{kind:image}}"]) == 0
    said = capsys.readouterr().err
    assert f"{EPISODES + 2} episodes, {(EPISODES + 2) * LENGTH} steps" in said
    assert f"extra   left out: {data} has no column extra, which {lerobot} has" in said
    results = json.loads((output / "evaluation" / "results.json").read_text())
    assert main(["evaluate", f"bundle={output / 'bundle'}", f"output_dir={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["action_error"] == pytest.approx(results["action_error"])
    config = yaml.safe_load((output / "bundle" / "config.yaml").read_text())
    assert config["data"] == [str(data), str(lerobot)]
    one = json.loads((output / "bundle" / "spec.json").read_text())["demonstrations"]
    assert one == f"{data} and {lerobot}"


def two_episodes() -> dict[str, np.ndarray]:
    """Two episodes with the columns of `data`."""
    random, n = np.random.default_rng(1), 2 * LENGTH
    joints = random.normal(size=(n, 7)).astype(np.float32)
    pictures = {
        key: random.integers(0, 256, (n, *size, 3), dtype=np.uint8)
        for key, size in {"front": (24, 32), "wrist": (16, 16)}.items()
    }
    return {**pictures, "joints": joints, "action": joints, "reward": np.zeros(n, np.float32)}


@pytest.mark.slow
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


def leaky(n: int = EPISODES * LENGTH) -> dict[str, np.ndarray]:
    """A buffer of what must not be learnt from, beside joints, a gripper and a camera."""
    random = np.random.default_rng(0)
    joints = np.cumsum(random.normal(size=(n, 3)), axis=0).astype(np.float32)
    action = random.normal(size=(n, 2)).astype(np.float32)
    rows, episode = np.arange(n), np.arange(n) // LENGTH
    named = {
        "action_abs": action, "abs_action": action, "actions": action, "action.joint_position": action, "cmd": action,
        "joint_command": action, "next_obs.joints": joints, "next.reward": rows, "rewards": joints[:, 0],
        "next.done": rows, "is_first": rows % LENGTH == 0, "isTerminal": rows, "success": joints[:, 0],
        "closed": joints[:, 0] > 0, "timestamp": random.random(n), "cameraTime": random.random(n),
        "frame_index": rows, "FrameIndex": rows, "task_index": rows * 0, "step": rows, "episode": episode,
        "demo": episode, "states": joints, "progress": (rows % LENGTH) / LENGTH, "to_go": (LENGTH - rows % LENGTH),
        "number": episode, "clip": random.random((n, 2, 9, 9, 3)), "depth": np.ones((n, 9, 12), np.float32),
    }  # fmt: skip
    seen = {
        "joints": joints, "gripper": joints[:, 0], "reaction_force": joints, "contacts": rows % 3,
        "pose": random.random((n, 4, 4)), "wrist": random.integers(0, 256, (n, 3, 9, 12), dtype=np.uint8),
    }  # fmt: skip
    return {"action": action} | named | seen


SEEN = {"joints": (3,), "gripper": (1,), "reaction_force": (3,), "contacts": (1,), "pose": (4, 4), "wrist": (9, 12, 3)}
TASK = {
    "name": "custom", "control_rate": None, "n_obs_steps": 2, "horizon": 8, "n_action_steps": 4,
    "action": {"source": "action"},
}  # fmt: skip


def buffer_of(arrays: dict[str, np.ndarray], **attrs: object) -> ReplayBuffer:
    return ReplayBuffer.from_arrays(arrays, np.arange(1, EPISODES + 1) * LENGTH, attrs)


def test_what_tells_the_answer_is_no_observation_unless_it_is_named() -> None:
    buffer = buffer_of(leaky(), control_rate=30)
    spec = describe(TASK, buffer, {})
    assert {key: value.shape for key, value in spec.observations.items()} == SEEN
    assert spec.control_rate == 30
    left_out = {key for key, words in spec.buffer_columns.items() if words.startswith("left out: ")}
    assert left_out == buffer._columns.keys() - SEEN.keys() - {"action"}
    lines = learnt_from(spec, buffer)
    assert len(lines) == len(buffer.keys) + 1
    assert "action_abs             left out: another version of the action" in lines
    assert "wrist                  observed: a camera of 12 × 9 pixels, colours moved to the last axis" in lines
    named = describe({**TASK, "observations": {"command": {"source": "action_abs"}, "wrist": {}}}, buffer, {})
    assert {key: value.shape for key, value in named.observations.items()} == {"command": (2,), "wrist": (9, 12, 3)}
    assert named.buffer_columns["action_abs"] == "observed (as command): 2 values"
    assert named.buffer_columns["joints"] == "left out: the task does not name it"
    assert PolicySpec.from_json(json.loads(json.dumps(with_statistics(spec))), "here").buffer_columns


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("target", lambda action: action.astype(np.float64), "it holds the action's own values"),
        ("leader_qpos", lambda action: action + 1, "another version of the action"),
        ("cam", lambda action: np.zeros((len(action), 12 * 9 * 3), np.uint8), "a picture in one row"),
    ],
)
def test_a_column_that_is_the_answer_or_no_state(name: str, make: Callable[[np.ndarray], np.ndarray], reason: str):
    arrays = {key: value for key, value in leaky().items() if key in ("action", "joints")}
    buffer = buffer_of(arrays | {name: make(arrays["action"])}, control_rate=30)
    spec = describe(TASK, buffer, {})
    assert set(spec.observations) == {"joints"}
    assert spec.buffer_columns[name].startswith(f"left out: {reason}")
    assert set(describe({**TASK, "observations": {name: {"kind": "state"}}}, buffer, {}).observations) == {name}


def test_values_that_are_no_numbers_once_mapped_are_refused_before_training() -> None:
    values = 1e38 * np.cos(np.arange(EPISODES * LENGTH))[:, None]
    spec = describe(TASK, buffer_of({"action": leaky()["action"], "joints": values}), {})
    with pytest.raises(InputError, match=r"'joints' has values from -\S+e\+3\d to 1e\+38, too far apart to be learnt"):
        fit_normalizer({"normalizer": {}}, spec, lambda key: values, lambda key: (values, values[:, None]))


def with_statistics(spec: PolicySpec) -> dict:
    statistics = {"scale": [1.0], "offset": [0.0]}
    return replace(spec, normalizer=dict.fromkeys((*spec.states, "action"), statistics)).to_json()


def test_bundles_from_before_do_not_say_what_was_left_out() -> None:
    saved = with_statistics(describe(TASK, buffer_of(leaky()), {}))
    del saved["buffer_columns"]
    assert PolicySpec.from_json(saved, "here").buffer_columns == {}


@pytest.mark.parametrize(
    ("changes", "attrs", "message"),
    [
        ({"control_rate": 10.0}, {"control_rate": 30}, "has 30 steps a second, the policy's control_rate is 10"),
        ({"control_rate": 10.0}, {"fps": 29.97}, "has 29.97 steps a second"),
        ({}, {"control_rate": "fast"}, "attribute control_rate is 'fast', expected a number of Hz above 0"),
        ({}, {"control_rate": -1}, "attribute control_rate is -1"),
        ({}, {"fps": float("nan")}, "attribute fps is nan"),
        ({"observations": {"depth": {}}}, {}, "looks like depth, which is not learnt from"),
        ({"observations": {"clip": {}}}, {}, "images must be [N, H, W, 3]"),
        ({"observations": {"wrist": {"kind": "state"}}}, {}, "a picture, and cannot be observation 'wrist'"),
        ({"observations": {"action": {"source": "joints"}}}, {}, "'action' is what the action is called"),
        ({"observations": {"a/b": {"source": "joints"}}}, {}, "'a/b' is no key"),
        ({"action": {"source": "wrist"}}, {}, "a picture, and cannot be the action"),
    ],
)
def test_what_cannot_be_learnt_from_is_said(changes: dict, attrs: dict, message: str) -> None:
    buffer = buffer_of(leaky(), **attrs)

    def start() -> None:
        spec = describe({**TASK, **changes}, buffer, {})
        prepare(buffer, spec, device=torch.device("cpu"), val_fraction=0.2, seed=0)

    with pytest.raises(InputError, match=re.escape(message)) as caught:
        start()
    assert "\n" not in str(caught.value)


def test_a_rate_that_nobody_says_is_assumed_and_said() -> None:
    buffer = buffer_of(leaky())
    spec = describe(TASK, buffer, {})
    assert spec.control_rate == 10
    assert learnt_from(spec, buffer)[-1].endswith(
        "10 steps a second, which the buffer does not say: task.control_rate=HZ"
    )
    close = buffer_of(leaky(), fps=29.97)
    assert describe({**TASK, "control_rate": 30.0}, close, {}).control_rate == 30


def test_only_what_tells_the_answer_is_nothing_to_learn_from() -> None:
    arrays = leaky()
    only = {key: arrays[key] for key in ("action", "action_abs", "timestamp")}
    with pytest.raises(InputError, match=r"no observations beside 'action': action_abs \(another version.*timestamp"):
        describe(TASK, buffer_of(only), {})


@pytest.mark.slow
def test_keys_with_dots_train_and_load(tmp_path: Path) -> None:
    arrays = leaky()
    dotted = {
        "state.joints.left": arrays["joints"],
        "cam.left": np.moveaxis(arrays["wrist"], 1, -1),
        "keys": arrays["pose"],
    }
    buffer_of({"action": arrays["action"], **dotted}).save(tmp_path / "dots.zarr")
    words = [f"data={tmp_path / 'dots.zarr'}", f"output_dir={tmp_path / 'run'}", *SMALL, "evaluation.n_episodes=0"]
    assert main(["train", "task=custom", *words]) == 0
    policy = policy_package.load(tmp_path / "run" / "bundle", verify=True)
    assert list(policy.spec.observations) == ["cam.left", "keys", "state.joints.left"]


@pytest.mark.parametrize("key", ["state", "a.b", "a%2Eb", "a%b", "keys", "training", "forward", ".."])
def test_parts_have_names_for_every_key(key: str) -> None:
    statistics: dict[str, Any] = {
        name: {"scale": [2.0], "offset": [number]} for number, name in enumerate(("a.b", "a%2Eb", "a_b", key))
    }
    normalizer = Normalizer(statistics)
    assert normalizer.normalize(key, torch.ones(1)).item() == 2 + statistics[key]["offset"][0]
    parts = torch.nn.ModuleDict({module_name(name): torch.nn.Identity() for name in {"a.b", "a%2Eb", key}})
    assert len(parts) == len({"a.b", "a%2Eb", key})
    assert module_name("agent_pos") == "agent_pos"  # as in the bundles that there are


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.observations={cam:{source:fronts,kind:image}}"], "did you mean front"),
        (["task.observations={cam:{source:joints,kind:image}}"], "images must be [N, H, W, 3]"),
        (["task.observations={q:{source:joints,columns:[9]}}"], "columns [9] do not exist"),
        (["task.action={source:actions}"], "did you mean action"),
        (["task.observations={q:{source:joints,kind:vector}}"], "kind=vector: choose from state, image"),
    ],
)
def test_what_the_buffer_lacks_is_named(data, tmp_path, capsys, words, message):
    assert main(["train", "task=custom", f"data={data}", f"output_dir={tmp_path / 'run'}", *SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_rate_that_only_time_stamps_tell_is_taken_and_said() -> None:
    n = EPISODES * LENGTH
    time = (np.arange(n) % LENGTH * 1001 / 30_000).round(6)
    buffer = buffer_of({**leaky(), "timestamp": time})
    spec = describe(TASK, buffer, {})
    assert spec.control_rate == 29.97
    assert learnt_from(spec, buffer)[-1].endswith("29.97 steps a second, by the times in timestamp")
    other = describe({**TASK, "control_rate": 10.0}, buffer, {})
    assert learnt_from(other, buffer)[-1].endswith("as the task says; by the times in timestamp there are 29.97")


@pytest.mark.parametrize("scale", [1e3, 1e9, 29.97])
def test_times_in_milliseconds_and_numbers_of_frames_tell_no_rate(scale: float) -> None:
    time = np.arange(EPISODES * LENGTH) % LENGTH / 29.97
    assert describe(TASK, buffer_of({**leaky(), "timestamp": time * scale}), {}).control_rate == 10
