"""Small inputs of other people's, in the shapes of public reports: each is taken as it is, or refused in one line.

They lie beside the data of `ACTION_DIFFUSION_DATA`, a folder each, with a README that says what it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options import configuration
from action_diffusion.policy.build import build_policy, fit_normalizer, with_statistics
from action_diffusion.training.data import describe, learnt_from, prepare

CASES = Path(os.environ.get("ACTION_DIFFUSION_DATA", "")).parent / "cases"
SMALL = ("encoder=resnet18_small", "policy.denoiser.channels=[8,16]", "policy.encoder.keypoints=4", "device=cpu")
SIX = {"state": [6]}


class Learnt(NamedTuple):
    """What task=custom makes of a replay buffer. observations: key → shape. left_out: column → part of the reason.

    words: parts of what is said of columns that are taken. action: number of values.
    """

    observations: Mapping[str, list[int]]
    left_out: Mapping[str, str] = {}
    words: Mapping[str, str] = {}
    action: int = 6
    rate: float = 10.0


class Converted(NamedTuple):
    """What `data convert` writes, with the keys of the result."""

    keys: tuple[str, ...]


class Refused(NamedTuple):
    """Part of the one line."""

    message: str


Outcome = Learnt | Converted | Refused
VARIANT = "another version of the action"
JOINTS = {f"joint_{number}": [1] for number in range(6)}
EXPECTED: dict[str, Outcome] = {
    "leak_action_abs": Learnt(SIX, {"action_abs": VARIANT}),
    "zarr3_zero_force": Learnt({"force": [6], **SIX}, words={"force": "2 of 2 chunks are not in the file"}),
    "zarr_action_1d": Learnt(SIX, action=1),
    "zarr_action_3d": Learnt(SIX, words={"action": "[2, 3] as one vector"}),
    "zarr_action_variants": Learnt(SIX, {"action_abs": VARIANT, "action_delta": VARIANT}),
    "zarr_chw": Learnt({"cam": [32, 40, 3], **SIX}, words={"cam": "colours moved to the last axis"}),
    "zarr_depth16": Learnt(SIX, {"depth": "depth, which is not learnt from ([32, 40] uint16)"}),
    "zarr_empty_dim": Learnt(SIX, {"extra": "it has no values"}),
    "zarr_ends_float": Learnt(SIX),
    "zarr_fixed_string": Learnt(SIX, {"label": "it holds words"}),
    "zarr_float01": Learnt({"cam": [32, 40, 3], **SIX}, words={"cam": "floats from 0 to 1, times 255"}),
    "zarr_gray": Learnt({"cam": [32, 40, 3], **SIX}, words={"cam": "grey, as three equal colours"}),
    "zarr_index_columns": Learnt(
        SIX, {"episode_index": "it counts", "frame_index": "it counts", "timestamp": "a time"}
    ),
    "zarr_jpeg2k": Refused("data/img cannot be read"),  # its chunks are no JPEG 2000
    "zarr_key_dot_image": Learnt({"cam.left": [48, 64, 3], **SIX}),
    "zarr_key_dot_state": Learnt({"state.joint_position": [6]}),
    "zarr_nested": Learnt({"obs.state": [6]}),
    "zarr_only_scalars": Learnt(JOINTS),
    "zarr_quat_flip": Learnt({"eef_pos": [3], "eef_quat": [4]}, action=7),
    "zarr_rate30": Learnt(SIX, rate=30.0),
    "zarr_rotvec_few": Learnt({"robot_eef_pose": [6]}),
    "zarr_scalar_gripper": Learnt({"gripper": [1], "joints": [5]}),
    "zarr_string_key": Learnt(SIX, {"prompt": "it holds words"}),
    "zarr_uint16_rgb": Refused("16 bits a colour: divide by 257"),
    "zarr_umi_keys": Refused("these are UMI's keys"),
}


def names() -> list[str]:
    return sorted(path.name for path in CASES.iterdir() if path.is_dir()) if CASES.is_dir() else []


def source(name: str) -> Path:
    """What of a case's folder is the input: the one thing beside README and expectations, or else the folder."""
    inputs = [path for path in (CASES / name).iterdir() if path.name != "README" and path.suffix != ".npy"]
    return inputs[0] if len(inputs) == 1 else CASES / name


@pytest.mark.slow
@pytest.mark.skipif(not names(), reason="no cases beside ACTION_DIFFUSION_DATA")
@pytest.mark.parametrize("name", names())
def test_what_people_have_is_taken_as_it_is_or_refused_in_one_line(name: str, tmp_path: Path, capsys: Any) -> None:
    expected = EXPECTED.get(name)
    if name.startswith(("zarr", "leak")):
        if not isinstance(expected, Refused):
            check_learnt(source(name), expected)
            return
        with pytest.raises(InputError, match=re.escape(expected.message)) as caught:
            check_learnt(source(name), expected)
        assert "\n" not in str(caught.value)
    elif name.startswith(("hdf5", "lerobot", "v3", "csv")):
        check_converted(source(name), tmp_path / "out.zarr", expected, capsys)
    else:
        pytest.skip("it is about training: its own tests have it")


def check_learnt(path: Path, expected: Outcome | None) -> None:
    """Everything that training does before its first step, a loss and a prediction."""
    config = configuration.load("train", ["task=custom", f"data={path}", *SMALL])
    buffer = ReplayBuffer.open(path)
    spec = describe(config["task"], buffer, {})
    data = prepare(buffer, spec, device=torch.device("cpu"), val_fraction=0.2, seed=0)
    statistics = fit_normalizer(config["policy"], spec, data.train.values, data.chunks)
    policy = build_policy(config["policy"], with_statistics(spec, statistics))
    batch = data.train.gather(np.arange(2))
    assert torch.isfinite(policy(batch.obs, batch.action, batch.mask))
    obs = {key: value[0].numpy() for key, value in batch.obs.items()}
    assert policy.predict(obs)["action"].shape == (8, *spec.action.shape)
    assert isinstance(expected, Learnt)
    assert {key: list(value.shape) for key, value in spec.observations.items()} == expected.observations
    assert (spec.action.shape, spec.control_rate) == ((expected.action,), expected.rate)
    left_out = {key for key, words in spec.buffer_columns.items() if words.startswith("left out")}
    assert left_out == set(expected.left_out)
    said = {line.split()[0]: line for line in learnt_from(spec, buffer)}
    for key, words in {**expected.left_out, **expected.words}.items():
        assert words in said[key]


def check_converted(path: Path, output: Path, expected: Outcome | None, capsys: Any) -> None:
    code = main(["data", "convert", f"in={path}", f"out={output}"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if expected is None:
        assert code in (0, 2)
    elif isinstance(expected, Refused):
        assert code == 2
        assert expected.message in said.err
        assert len(said.err.strip().splitlines()) == 1
    else:
        assert code == 0, said.err
        assert isinstance(expected, Converted)
        assert tuple(ReplayBuffer.open(output).keys) == expected.keys
