"""Poses relative to the gripper's own, beside scipy: whatever the numbers of a rotation, also at half a turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy, fit_normalizer, with_statistics
from action_diffusion.policy.model.poses import KNOWN, Pose, from_matrix, to_matrix
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.rotations import WIDTHS, RotationColumns

B, H, TO = 40, 6, 2


def numbers(rotation: Rotation, representation: str) -> np.ndarray:
    """[N, n], as files have them."""
    if representation == "rotation_vector":
        return rotation.as_rotvec()
    if representation == "rotation_6d":
        return rotation.as_matrix()[:, :2].reshape(-1, 6)
    return rotation.as_quat(scalar_first=representation == "quaternion_wxyz")


def rotations(n: int, seed: int = 0) -> Rotation:
    """Random ones, and some at half a turn and just beside it, about the axes and others."""
    random = np.random.default_rng(seed)
    axes = np.concatenate([np.eye(3), -np.eye(3), Rotation.random(6, random_state=seed).as_matrix()[:, 0]])
    angles = random.choice([0.0, 1e-9, 1e-4, np.pi - 1e-6, np.pi, np.pi + 1e-6, 2 * np.pi], len(axes))
    special = Rotation.from_rotvec(axes * angles[:, None])
    whole = Rotation.concatenate([special, Rotation.random(n, random_state=seed)])
    return whole[random.permutation(len(whole))[:n]]


@pytest.mark.parametrize("representation", KNOWN)
def test_matrices_are_scipy_s(representation: str) -> None:
    rotation = rotations(300)
    values = torch.tensor(numbers(rotation, representation), dtype=torch.float32)
    made = to_matrix(values, representation)
    np.testing.assert_allclose(made, rotation.as_matrix(), atol=2e-6)
    back = from_matrix(torch.tensor(rotation.as_matrix(), dtype=torch.float32), representation)
    np.testing.assert_allclose(to_matrix(back, representation), rotation.as_matrix(), atol=2e-6)
    exact = from_matrix(to_matrix(values.double(), representation), representation)
    np.testing.assert_allclose(to_matrix(exact, representation), rotation.as_matrix(), atol=1e-6)


@pytest.mark.parametrize("representation", KNOWN)
def test_gradients_are_finite_at_no_turn_and_at_half_a_turn(representation: str) -> None:
    turns = Rotation.from_rotvec([[0, 0, 0], [np.pi, 0, 0], [0, 1e-7, 0]])
    values = torch.tensor(numbers(turns, representation), dtype=torch.float32, requires_grad=True)
    from_matrix(to_matrix(values, representation), representation).sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


def spec(representation: str, *, grippers: int = 1, apart: bool = False) -> PolicySpec:
    """A pose (position, rotation) for each gripper, in one observation or in two, and a width at the action's end."""
    n, turn = WIDTHS[representation], RotationColumns(3, representation)
    observations: dict[str, ObservationSpec] = {}
    for i in range(grippers):
        if apart:
            alone = RotationColumns(0, representation)
            observations |= {
                f"pos{i}": ObservationSpec(shape=(3,), source=f"pos{i}"),
                f"rot{i}": ObservationSpec(shape=(n,), source=f"rot{i}", rotations=(alone,)),
            }
        else:
            observations[f"pose{i}"] = ObservationSpec(shape=(n + 4,), source=f"pose{i}", rotations=(turn,))
    turns = tuple(RotationColumns(3 + i * (3 + n), representation) for i in range(grippers))
    return PolicySpec(
        observations=observations,
        action=ActionSpec(shape=((3 + n) * grippers + 1,), rotations=turns),
        n_obs_steps=TO,
        horizon=H,
        n_action_steps=4,
        control_rate=10.0,
    )


def poses(n: int, seed: int) -> tuple[Rotation, np.ndarray]:
    return rotations(n, seed), np.random.default_rng(seed).normal(size=(n, 3))


def rows(pose: tuple[Rotation, np.ndarray], representation: str) -> np.ndarray:
    return np.concatenate([pose[1], numbers(pose[0], representation)], axis=1)


def seen_from(origin: tuple[Rotation, np.ndarray], pose: tuple[Rotation, np.ndarray]) -> np.ndarray:
    """T⁻¹ T', as position and 6D: [N, 9]."""
    inverse = origin[0].inv()
    turn, place = inverse * pose[0], inverse.apply(pose[1] - origin[1])
    return np.concatenate([place, turn.as_matrix()[:, :2].reshape(-1, 6)], axis=1)


def tensor(values: np.ndarray, *shape: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(*shape, -1)


def repeated(pose: tuple[Rotation, np.ndarray], times: int) -> tuple[Rotation, np.ndarray]:
    index = np.repeat(np.arange(len(pose[1])), times)
    return pose[0][index], pose[1][index]


@pytest.mark.parametrize("representation", KNOWN)
@pytest.mark.parametrize("apart", [False, True])
def test_chunks_in_the_frame_are_scipy_s_and_come_back(representation: str, apart: bool) -> None:
    one = spec(representation, apart=apart)
    frame = Pose(spec=one, position="pos0", rotation="rot0") if apart else Pose(spec=one, position="pose0")
    now, target = poses(B, 0), poses(B * H, 1)
    width = np.random.default_rng(2).normal(size=(B * H, 1))
    action = tensor(np.concatenate([rows(target, representation), width], axis=1), B, H)
    held = rows(now, representation)
    state = tensor(held if apart else np.concatenate([held, width[:B]], axis=1), B)
    entered = frame.enter(action, state)
    assert entered.shape == (B, H, frame.output_dim) == (B, H, 10)
    expected = np.concatenate([seen_from(repeated(now, H), target), width], axis=1)
    np.testing.assert_allclose(entered.reshape(B * H, 10), expected, atol=1e-5)
    back = frame.leave(entered, state)
    np.testing.assert_allclose(back[..., :3], action[..., :3], atol=1e-5)
    np.testing.assert_allclose(back[..., -1], action[..., -1], atol=0)
    turned = (to_matrix(values[..., 3:-1], representation) for values in (back, action))
    np.testing.assert_allclose(next(turned), next(turned), atol=1e-5)


@pytest.mark.parametrize("representation", ["rotation_vector", "quaternion_wxyz"])
def test_numbers_that_come_back_are_those_that_windows_have(representation: str) -> None:
    """A hand that points down and sways: vectors cross half a turn, and go on."""
    down, swaying = Rotation.from_rotvec([np.pi, 0, 0]), np.linspace(-0.5, 0.5, H)[:, None] * [1.0, 0.2, 0.1]
    sway = Rotation.from_rotvec(swaying) * down
    one = spec(representation)
    turn = one.action.rotations[0].fitted(np.pad(numbers(sway, representation), ((0, 0), (3, 1))))
    one = PolicySpec(**{**one.__dict__, "action": ActionSpec(shape=one.action.shape, rotations=(turn,))})
    frame, chunk = Pose(spec=one, position="pose0"), np.zeros((H, one.action.shape[0]), np.float32)
    chunk[:, 3:-1] = numbers(sway, representation)
    from action_diffusion.rotations import continuous

    windows = continuous(torch.from_numpy(chunk)[None], one.action.rotations)
    state = tensor(np.pad(rows((sway[2:3], np.ones((1, 3))), representation), ((0, 0), (0, 1))), 1)
    back = frame.leave(frame.enter(windows, state), state)
    torch.testing.assert_close(back, windows, atol=1e-5, rtol=0)
    assert back[0].diff(dim=0).abs().max() < 0.3


def test_what_is_observed_is_seen_from_now_and_each_gripper_sees_the_other() -> None:
    one = spec("quaternion_xyzw", grippers=2)
    frame = Pose(spec=one, position=["pose0", "pose1"])
    hands = [poses(B * TO, seed) for seed in (3, 4)]
    rest = np.random.default_rng(5).normal(size=(B * TO, 1))
    states = {
        f"pose{i}": tensor(np.concatenate([rows(hand, "quaternion_xyzw"), rest], axis=1), B, TO)
        for i, hand in enumerate(hands)
    }
    seen = frame.observe(states)
    last = np.repeat(np.arange(TO - 1, B * TO, TO), TO)
    for i, (mine, other) in enumerate([hands, hands[::-1]]):
        own, its = (seen_from((hand[0][last], hand[1][last]), mine) for hand in (mine, other))
        expected = np.concatenate([rest, own[:, :3], own[:, 3:], its[:, :3], its[:, 3:]], axis=1)
        np.testing.assert_allclose(seen[f"pose{i}"].reshape(B * TO, -1), expected, atol=1e-5)
        identity = seen[f"pose{i}"][:, -1, 1:10]
        np.testing.assert_allclose(identity, np.tile([0, 0, 0, 1, 0, 0, 0, 1, 0], (B, 1)), atol=1e-5)
    assert {key: value.shape[-1] for key, value in seen.items()} == frame.observed_dims
    assert Pose(spec=one, position=["pose0", "pose1"], observed="absolute").observe(states) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"position": "pos"}, "unknown state in policy.action_frame.position 'pos': did you mean pose0"),
        ({"position": "pose0", "rotation": "rot"}, "unknown state in policy.action_frame.rotation 'rot'"),
        ({"position": ["pose0", "pose0"]}, "2 positions and 2 rotations are observed, the action has 1 rotations"),
        ({"position": "pose0", "rotation": "pose0@2"}, r"'pose0' has 0 rotations at column 2: task.rotations.pose0="),
        ({"position": "pose0@1"}, "column 3 of pose0 is in two positions or rotations"),
        ({"position": "pose0@6", "rotation": "pose0@3"}, "column 7 does not exist in pose0 of 7 values"),
        ({"position": "pose0", "action_positions": [1]}, "column 3 of the action is in two positions or rotations"),
        ({"position": "pose0", "action_positions": [0, 3]}, "2 action_positions for 1 rotations of the action"),
    ],
)
def test_what_does_not_fit_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pose(spec=spec("rotation_vector"), **words)


@pytest.mark.parametrize("representation", ["quaternion", "euler"])
def test_numbers_that_do_not_say_which_rotation_they_are_are_refused(representation: str) -> None:
    with pytest.raises(InputError, match=f"is {representation}, which does not say what its numbers are"):
        Pose(spec=spec(representation), position="pose0")


def test_rows_that_are_no_6d_rotation_are_found() -> None:
    rows = np.array([[1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0], [2, 0, 0, 4, 0, 0], [0.1, 0, 0, 0, 0.1, 0]])
    assert RotationColumns(0, "rotation_6d").missing(rows).tolist() == [False, True, True, False]


CONFIG = {
    "normalizer": {"default": "minmax"},
    "encoder": {"name": "observation"},
    "denoiser": {"name": "unet1d", "channels": [16, 32], "time_dim": 16},
    "process": {"name": "diffusion", "prediction": "sample"},
    "sampler": {"scheduler": "ddim", "num_inference_steps": 5},
    "objective": {"loss": "mse"},
}
FRAME = {"name": "pose", "position": "pose0"}


def moved(pose: tuple[Rotation, np.ndarray], by: np.ndarray, step: float) -> tuple[Rotation, np.ndarray]:
    """Each pose after `step` of the twist that its row of `by` [N, 1] asks for, in the tool's own axes."""
    turn = Rotation.from_rotvec(step * np.concatenate([0.2 * by, np.zeros_like(by), 0.5 + 0 * by], axis=1))
    place = step * np.concatenate([0.02 * by, 0 * by, 0.05 + 0 * by], axis=1)
    return pose[0] * turn, pose[1] + pose[0].apply(place)


def windows(starts: tuple[Rotation, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations [N, To, 7 + 1] and chunks [N, H, 7 + 1] of one motion in the tool's axes, from `starts`."""
    asked = np.random.default_rng(seed).uniform(-1, 1, size=(len(starts[1]), 1))
    steps = [rows(moved(starts, asked, step), "quaternion_xyzw") for step in range(-1, H - 1)]
    chunk = np.stack([np.concatenate([step, asked], axis=1) for step in steps], axis=1).astype(np.float32)
    return chunk[:, :TO], chunk


def trained(frame: dict[str, Any] | None, obs: np.ndarray, chunk: np.ndarray, steps: int) -> DiffusionPolicy:
    config, one = CONFIG | {"action_frame": frame}, spec("quaternion_xyzw")
    statistics = fit_normalizer(
        config,
        one,
        {"pose0": obs.reshape(-1, 8), "action": chunk.reshape(-1, 8)}.__getitem__,
        lambda _: (obs[:, -1], chunk),
        read_history=lambda _: obs,
    )
    torch.manual_seed(0)
    policy = build_policy(config, with_statistics(one, statistics))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(obs), (64,), generator=generator).numpy()
        loss = policy({"pose0": torch.from_numpy(obs[index])}, torch.from_numpy(chunk[index]), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval()


def error(policy: DiffusionPolicy, obs: np.ndarray, chunk: np.ndarray) -> tuple[float, float]:
    """Of executed poses: metres, and radians; means over windows."""
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        said = policy.sample({"pose0": torch.from_numpy(obs)}, noise_generator=noise).action.numpy()[:, TO - 1 :]
    true = chunk[:, TO - 1 :]
    turns = [Rotation.from_quat(part[..., 3:7].reshape(-1, 4)) for part in (said, true)]
    between = (turns[0].inv() * turns[1]).magnitude()
    return float(np.linalg.norm(said[..., :3] - true[..., :3], axis=-1).mean()), float(between.mean())


def test_a_policy_in_the_gripper_s_frame_acts_alike_wherever_it_starts() -> None:
    """The same history, elsewhere and turned, gives the same chunk, elsewhere and turned."""
    obs, chunk = windows(poses(B, 7), 0)
    policy = trained(FRAME, obs, chunk, steps=2)
    assert policy.spec.noise_shape == (H, 10)
    by, along = Rotation.from_rotvec([0.3, 3.0, -0.4]), np.array([1.0, -2.0, 0.5])
    there = obs.copy()
    there[..., :3] = by.apply(obs[..., :3].reshape(-1, 3)).reshape(B, TO, 3) + along
    there[..., 3:7] = (by * Rotation.from_quat(obs[..., 3:7].reshape(-1, 4))).as_quat().reshape(B, TO, 4)
    noise = torch.randn(B, H, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = [policy.sample({"pose0": torch.from_numpy(values)}, noise=noise) for values in (obs, there)]
    one, two = (sample.action.numpy() for sample in samples)
    place = by.apply(one[..., :3].reshape(-1, 3)).reshape(B, H, 3) + along
    np.testing.assert_allclose(two[..., :3], place, atol=1e-4)
    turns = [Rotation.from_quat(part[..., 3:7].reshape(-1, 4)) for part in (one, two)]
    assert ((by * turns[0]).inv() * turns[1]).magnitude().max() < 1e-3


def upright(n: int, seed: int) -> tuple[Rotation, np.ndarray]:
    """Starts with the hand about upright, within 0.3 m."""
    random = np.random.default_rng(seed)
    return Rotation.from_rotvec(0.3 * random.normal(size=(n, 3))), random.uniform(-0.3, 0.3, size=(n, 3))


@pytest.mark.slow
def test_a_motion_of_the_tool_is_learnt_for_starts_that_nobody_demonstrated() -> None:
    """Demonstrated upright, done anywhere. Absolute poses learn it where it was demonstrated, and only there."""
    demonstrations, alike = windows(upright(200, 0), 0), windows(upright(100, 1), 1)
    elsewhere = windows((Rotation.random(100, random_state=3), np.random.default_rng(2).uniform(-1, 1, (100, 3))), 1)
    subtracted = {"name": "position", "observation": "pose0", "columns": [0, 1, 2], "action_columns": [0, 1, 2]}
    policies = [trained(frame, *demonstrations, steps=400) for frame in (FRAME, subtracted, None)]
    relative, position, absolute = ([error(policy, *tests) for tests in (alike, elsewhere)] for policy in policies)
    for metres, radians in relative:
        assert metres < 0.01
        assert radians < 0.05
    assert position[0][0] < 0.02
    assert position[1][0] > 0.05
    assert absolute[0][0] < 0.05
    assert absolute[0][1] < 0.15
    assert absolute[1][0] > 0.1
    assert absolute[1][1] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("representation", ["rotation_vector", "rotation_6d"])
def test_from_a_buffer_to_a_bundle(representation: str, tmp_path: Any) -> None:
    """UMI's columns: position and rotation apart, an action of both and a width."""
    path = [rows((rotations(20, seed), np.zeros((20, 3))), representation) for seed in range(3)]
    values = np.concatenate(path).astype(np.float32)
    arrays = {
        "robot0_eef_pos": values[:, :3],
        "robot0_eef_rot": values[:, 3:],
        "action": np.concatenate([values, values[:, :1]], axis=1),
    }
    ReplayBuffer.from_arrays(arrays, [20, 40, 60], {"control_rate": 10.0}).save(tmp_path / "umi.zarr")
    words = [
        *("train", "task=custom", f"data={tmp_path}/umi.zarr", f"output_dir={tmp_path}/run", "train.max_steps=2"),
        *(f"task.rotations.robot0_eef_rot={representation}", f"task.rotations.action={representation}@3"),
        "policy.action_frame={name: pose, position: robot0_eef_pos, rotation: robot0_eef_rot}",
        *("policy.denoiser.channels=[8,16]", "train.batch_size=8", "device=cpu", "train.tensorboard=false"),
    ]
    assert main(words) == 0
    policy = bundles.load(tmp_path / "run" / "bundle", verify=True)
    obs = {key: arrays[key][:2] for key in ("robot0_eef_pos", "robot0_eef_rot")}
    assert policy.predict(obs)["action"].shape == (8, values.shape[1] + 1)
