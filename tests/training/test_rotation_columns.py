"""Columns that are rotations: windows without jumps, whatever sign or turn was recorded, and valid rotations out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.rotations import declared_rotations
from action_diffusion.errors import InputError
from action_diffusion.options import configuration
from action_diffusion.policy.build import build_policy, fit_normalizer, with_statistics
from action_diffusion.policy.bundle import read_spec
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.rotations import SIZES, RotationColumns, continuous, continuous_rows, parse_rotations, valid
from action_diffusion.training.data import describe, prepare

LENGTH, EPISODES = 60, 4
SMALL = ("policy.denoiser.channels=[8,16]", "device=cpu")


def turns() -> Rotation:
    """A hand that points down, and sways about it: half a turn from the identity, where names of rotations change."""
    time = np.arange(LENGTH * EPISODES) * 0.1
    sway = np.stack([0.4 * np.sin(time), 0.3 * np.cos(0.7 * time), 0.5 * np.sin(0.5 * time)], axis=1)
    return Rotation.from_rotvec(sway) * Rotation.from_rotvec([np.pi, 0, 0])


def written(representation: str) -> np.ndarray:
    """[N, n] as files have them: quaternions of any sign, vectors and angles within half a turn."""
    rotation, random = turns(), np.random.default_rng(0)
    if representation.startswith("quaternion"):
        signs = random.choice([-1, 1], len(rotation))[:, None]
        return rotation.as_quat(scalar_first=representation == "quaternion_wxyz") * signs
    if representation == "rotation_vector":
        return rotation.as_rotvec()
    degrees = representation.endswith("degrees")
    euler = rotation.as_euler("xyz", degrees=degrees)
    return euler if representation.startswith("euler") else euler[:, :1]


def same(values: np.ndarray, others: np.ndarray, representation: str) -> bool:
    """Whether both [..., n] are the same rotations, asked of scipy."""

    def matrix(rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.float64).reshape(-1, SIZES[representation])
        if SIZES[representation] == 4:
            return Rotation.from_quat(rows, scalar_first=representation == "quaternion_wxyz").as_matrix()
        if representation == "rotation_vector":
            return Rotation.from_rotvec(rows).as_matrix()
        rows = np.pad(rows, ((0, 0), (0, 3 - rows.shape[1])))
        return Rotation.from_euler("xyz", rows, degrees=representation.endswith("degrees")).as_matrix()

    return bool(np.allclose(matrix(values), matrix(others), atol=1e-5))


def largest_step(windows: np.ndarray, representation: str) -> float:
    steps = np.abs(np.diff(windows, axis=-2)).max()
    return float(np.deg2rad(steps) if representation.endswith("degrees") else steps)


@pytest.mark.parametrize("representation", SIZES)
def test_windows_are_continuous_and_the_same_rotations(representation: str) -> None:
    rows = written(representation)
    assert largest_step(rows, representation) > 1.5  # as it was recorded it jumps
    rotation = RotationColumns(1, representation).fitted(np.pad(rows, ((0, 0), (1, 0))))
    windows = np.pad(
        np.lib.stride_tricks.sliding_window_view(rows, 16, axis=0).swapaxes(1, 2), ((0, 0),) * 2 + ((1, 1),)
    )
    made = continuous(torch.from_numpy(windows), [rotation]).numpy()
    assert largest_step(made[..., 1:-1], representation) < 0.2
    assert largest_step(made[:, 0], representation) < 0.2  # nor does what is seen now from window to window
    assert same(made[..., 1:-1], windows[..., 1:-1], representation)
    np.testing.assert_array_equal(made[..., [0, -1]], 0)
    np.testing.assert_allclose(continuous(torch.from_numpy(made), [rotation]), made, atol=1e-12)


@pytest.mark.parametrize("representation", SIZES)
def test_episodes_are_made_continuous_alike(representation: str) -> None:
    rows = written(representation)
    made = continuous_rows(rows, RotationColumns(0, representation))
    assert largest_step(made, representation) < 0.2
    assert same(made, rows, representation)


def test_the_first_of_a_window_is_the_one_nearest_to_the_identity_where_nothing_else_is_known() -> None:
    xyzw, wxyz = parse_rotations(["quaternion_wxyz@4", "quaternion_xyzw"], 8, "here")
    first = continuous(torch.tensor([[[0.6, 0.0, 0.0, -0.8, -0.8, 0.6, 0.0, 0.0]]]), [xyzw, wxyz])
    np.testing.assert_allclose(first, [[[-0.6, 0, 0, 0.8, 0.8, -0.6, 0, 0]]])
    vector = continuous(torch.tensor([[[0.0, 4.0, 0.0]]]), [RotationColumns(0, "rotation_vector")])
    np.testing.assert_allclose(vector, [[[0, 4 - 2 * np.pi, 0]]], atol=1e-6)
    still = torch.tensor([[[0.0, 6.0, 0.0], [0.0, 0.0, 0.0]]])  # a whole turn is no turn, about any axis
    np.testing.assert_allclose(
        continuous(still, [RotationColumns(0, "rotation_vector", (0.0, 6.0, 0.0))])[0, 1], [0, 2 * np.pi, 0], atol=1e-5
    )


def test_what_a_network_says_becomes_a_unit_quaternion() -> None:
    rotation = RotationColumns(1, "quaternion_wxyz")
    said = torch.tensor([[9.0, 3.0, 0.0, 4.0, 0.0], [9.0, 0.0, 1e-9, 0.0, 0.0]])
    expected = np.array([[9, 0.6, 0, 0.8, 0], [9, 1, 0, 0, 0]])
    np.testing.assert_allclose(valid(said, [rotation]), expected, atol=1e-6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """pose: position and rotation vector. quat, and an action of a position and the quaternion of the next row."""
    place = np.sin(np.arange(LENGTH * EPISODES)[:, None] * [0.05, 0.07, 0.03])
    quat = written("quaternion_wxyz")
    arrays = {
        "pose": np.concatenate([place, written("rotation_vector")], axis=1),
        "quat": quat,
        "action": np.concatenate([place, quat[np.minimum(np.arange(len(quat)) + 1, len(quat) - 1)]], axis=1),
    }
    attrs = {"control_rate": 10.0, "rotations": {"pose": "rotation_vector@3", "quat": ["quaternion_wxyz"]}}
    arrays = {key: values.astype(np.float32) for key, values in arrays.items()}
    buffer = ReplayBuffer.from_arrays(arrays, np.arange(1, EPISODES + 1) * LENGTH, attrs)
    buffer.save(tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def test_from_a_buffer_to_an_arm(saved: Path) -> None:
    words = ["task=custom", f"data={saved}", "task.rotations.action=quaternion_wxyz@3", *SMALL]
    config, buffer = configuration.load("train", words), ReplayBuffer.open(saved)
    spec = describe(config["task"], buffer, {})
    assert "3 to 5 a rotation (rotation_vector)" in spec.buffer_columns["pose"]
    data = prepare(buffer, spec, device=torch.device("cpu"), val_fraction=0.25, seed=0)
    batch = data.train.gather(np.arange(len(data.train)))
    for values, kind in (
        (batch.obs["pose"][..., 3:], "rotation_vector"),
        (batch.obs["quat"], "quaternion_wxyz"),
        (batch.action[..., 3:], "quaternion_wxyz"),
    ):
        assert largest_step(values.numpy(), kind) < 0.2
    statistics = fit_normalizer(config["policy"], spec, data.statistics_rows, data.chunks)
    for key, values in (("action", batch.action), ("quat", batch.obs["quat"])):
        np.testing.assert_allclose(statistics[key]["max"], values.flatten(0, 1).amax(0), rtol=1e-6)
        np.testing.assert_allclose(statistics[key]["min"], values.flatten(0, 1).amin(0), rtol=1e-6)
    spec = with_statistics(spec, statistics)
    spec = PolicySpec.from_json(spec.to_json(), "spec.json")
    torch.manual_seed(0)
    policy = build_policy(config["policy"], spec).eval()
    obs = {key: value[5].numpy() for key, value in batch.obs.items()}
    noise = np.random.default_rng(0).normal(size=(1, spec.horizon, 7)).astype(np.float32)

    def predict(obs: dict[str, np.ndarray]) -> np.ndarray:
        return policy.predict(obs, noise=noise, generator=torch.Generator().manual_seed(0))["action_pred"]

    chunk = predict(obs)
    np.testing.assert_allclose(np.linalg.norm(chunk[:, 3:], axis=1), 1, atol=1e-5)
    flipped = obs | {"quat": obs["quat"] * [[-1], [1]]}  # what an arm says of the same rotations
    np.testing.assert_allclose(predict(flipped), chunk, atol=1e-5)


@pytest.mark.slow
def test_a_run_from_another_s_weights_keeps_its_references(saved: Path, tmp_path: Path) -> None:
    short = ("train.max_steps=2", "train.batch_size=8", "evaluation.n_episodes=0")
    words = ["train", "task=custom", f"data={saved}", *SMALL, *short]
    assert main([*words, f"output_dir={tmp_path / 'one'}"]) == 0
    buffer = ReplayBuffer.open(saved)
    turned = buffer["quat"][:].copy()[:, [1, 0, 2, 3]]
    arrays = {key: buffer[key][:] for key in buffer.keys} | {"quat": turned}
    ReplayBuffer.from_arrays(arrays, buffer.episode_ends, buffer.attrs).save(tmp_path / "b.zarr")
    words[2] = f"data={tmp_path / 'b.zarr'}"
    assert main([*words, f"output_dir={tmp_path / 'two'}", f"init={tmp_path / 'one' / 'bundle'}"]) == 0
    one, two = (read_spec(tmp_path / run / "bundle") for run in ("one", "two"))
    assert one.observations["quat"].rotations == two.observations["quat"].rotations
    assert one.observations["quat"].rotations[0].reference


def test_chosen_columns_keep_their_rotation(saved: Path) -> None:
    words = ["task=custom", f"data={saved}", *SMALL]
    words.append("task.observations={turn: {source: pose, columns: [3,4,5]}, part: {source: pose, columns: [0,4]}}")
    observations = describe(configuration.load("train", words)["task"], ReplayBuffer.open(saved), {}).observations
    assert [one.first for one in observations["turn"].rotations] == [0]
    assert observations["part"].rotations == ()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("quat=quaternion_xyz", "unknown rotation 'quaternion_xyz' in"),
        ("quat=rotation_vector@2", "expected rotation_vector@COLUMN, whose 3 columns are among 4"),
        ("quat=rotation_vector@x", "expected rotation_vector@COLUMN"),
        ("quta=quaternion_xyzw", "did you mean quat?"),
        ("pose=[rotation_vector,rotation_vector@2]", "share column 2"),
        ("quat=3", "task.rotations.quat=3: expected a rotation"),
    ],
)
def test_what_is_no_rotation_is_said_in_one_line(saved: Path, word: str, message: str, capsys, tmp_path: Path) -> None:
    words = [
        "train",
        "task=custom",
        f"data={saved}",
        f"output_dir={tmp_path / 'run'}",
        f"task.rotations.{word}",
        *SMALL,
    ]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("said", [3, {"quat": 3}, {"quat": [1]}, {"quat": "sideways"}, ["quat"]])
def test_a_hostile_attribute_is_refused(said: object) -> None:
    buffer = ReplayBuffer.from_arrays({"quat": np.ones((3, 4))}, [3], {"rotations": said})
    with pytest.raises(InputError, match="rotations"):
        declared_rotations(buffer)


def test_quaternions_of_zeros_are_refused_in_one_line(tmp_path: Path, capsys) -> None:
    rows = np.tile(np.array([0, 0, 0, 1], np.float32), (40, 1))
    rows[[7, 21]] = 0
    attrs = {"rotations": {"quat": "quaternion_xyzw"}}
    ReplayBuffer.from_arrays({"quat": rows, "action": np.ones((40, 2), np.float32)}, [20, 40], attrs).save(
        tmp_path / "d.zarr"
    )
    words = ["train", "task=custom", f"data={tmp_path / 'd.zarr'}", f"output_dir={tmp_path / 'run'}", *SMALL]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "'quat' has quaternions of zeros, which are no rotation, in 2 rows, row 7 first" in said
    assert len(said.strip().splitlines()) == 1
