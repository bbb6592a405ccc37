"""Small HDF5 files in robomimic's layout, and robosuite's, for tests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.errors import InputError

h5py = pytest.importorskip("h5py", reason="HDF5 files need h5py: the extra [robomimic]")

ENV_ARGS: dict[str, Any] = {
    "env_name": "Lift",
    "env_version": "1.4.1",
    "type": 1,
    "env_kwargs": {"robots": ["Panda"], "control_freq": 20, "controller_configs": {"type": "OSC_POSE"}},
}
MODEL = "<mujoco><!-- as large as a real one -->" + "<body name='arm'/>" * 3000 + "<cube size='{}'/></mujoco>"


def rows(length: int, seed: int, size: int = 8) -> dict[str, np.ndarray]:
    """What one demo holds, by its path in the demo."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (length + 1, size, size, 3), dtype=np.uint8)
    object_ = random.standard_normal((length + 1, 10))
    gripper = random.standard_normal((length + 1, 2)).astype(np.float32)
    return {
        "actions": random.uniform(-1, 1, (length, 7)),
        "states": random.standard_normal((length, 32)),
        "rewards": (np.arange(length) == length - 1).astype(np.float64),
        "dones": (np.arange(length) == length - 1).astype(np.int64),
        "obs/object": object_[:-1],
        "obs/robot0_gripper_qpos": gripper[:-1],
        "obs/agentview_image": images[:-1],
        "next_obs/object": object_[1:],
        "next_obs/robot0_gripper_qpos": gripper[1:],
        "next_obs/agentview_image": images[1:],
    }


def write_robomimic(path: Path, lengths: Sequence[int] = (5, 8, 3), *, size: int = 8, **create: Any) -> Path:
    """demo_0, demo_1, … of these lengths, masks train and valid. create: options of the images' datasets."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for number, length in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            for name, values in rows(length, number, size).items():
                demo.create_dataset(name, data=values, **(create if name.endswith("image") else {}))
            demo.attrs["num_samples"] = length
            demo.attrs["model_file"] = MODEL.format(number)
        data.attrs["total"] = sum(lengths)
        data.attrs["env_args"] = json.dumps(ENV_ARGS, indent=4)
        names = [f"demo_{number}" for number in range(len(lengths))]
        file["mask/train"] = np.array(names[:-1], dtype="S")
        file["mask/valid"] = np.array(names[-1:], dtype="S")
    return path


def write_robosuite(path: Path, lengths: Sequence[int] = (5, 8)) -> Path:
    """demo_1, demo_2, … with states and actions only."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for number, length in enumerate(lengths, start=1):
            demo = data.create_group(f"demo_{number}")
            for name in ("actions", "states"):
                demo[name] = rows(length, number)[name]
            demo.attrs["model_file"] = MODEL.format(number)
        info = {"date": "11-16-2022", "env": "Lift", "repository_version": "1.4.0"}
        data.attrs.update(info | {"env_info": json.dumps(ENV_ARGS["env_kwargs"])})
    return path


def contents(path: Path) -> dict[str, Any]:
    """Everything in a file: arrays by path, and attributes by path and name."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]
        found.update({f"{name}.{key}": value for key, value in item.attrs.items()})

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@dataclass(frozen=True)
class FakeObserver:
    """A simulator whose observations are plain functions of its states. It fails at the demo with `bad` steps."""

    settings: dict[str, Any] = field(default_factory=lambda: {"keys": ["object"]})
    bad: int = 0
    error: str = "raise"

    def __call__(self, model: str | None, states: np.ndarray) -> dict[str, np.ndarray]:
        if len(states) == self.bad:
            if self.error == "raise":
                raise InputError("no graphics")
            if self.error == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return {"object": states[:-1] if self.error == "short" else states * np.nan}
        size = len(model or "")
        pixels = (np.abs(states[:, :12]) * 50).astype(np.uint8).reshape(-1, 2, 2, 3)
        return {"object": states[:, :10] + size, "agentview_image": pixels}
