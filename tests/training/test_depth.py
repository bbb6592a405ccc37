"""Depth as an observation: uint16 in mm, 0 where it is unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from action_diffusion.datasets.batches.columns import ObsKey, load_cached
from action_diffusion.datasets.batches.columns import load as load_column
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder
from action_diffusion.training.run import train

HEIGHT, WIDTH = 16, 20


def frames(distance: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """uint16 [n, H, W]: a wall at `distance` [n] mm, with noise, and a tenth of its pixels unknown."""
    depth = distance[:, None, None] + random.normal(0, 5, (len(distance), HEIGHT, WIDTH))
    depth[random.random(depth.shape) < 0.1] = 0
    return depth.round().astype(np.uint16)


def recorded(path: Path, episodes: int = 6, **columns: Any) -> Path:
    """The action is how far the wall is, in m."""
    random, buffer = np.random.default_rng(0), ReplayBuffer.create(path, attrs={"control_rate": 10})
    for _ in range(episodes):
        distance = random.uniform(300, 900, 20)
        state = random.normal(size=(20, 1)).astype(np.float32)
        rows = {"state": state, "depth": frames(distance, random), "action": distance[:, None] / 1000}
        buffer.append({key: columns.get(key, lambda x: x)(value) for key, value in rows.items()})
    return path


def configured(data: Path, folder: Path, *options: str, steps: int = 2) -> dict[str, Any]:
    sizes = ["task.horizon=4", "task.n_obs_steps=1", "task.n_action_steps=1", "train.batch_size=16", "train.lr=3e-3"]
    net = ["policy.denoiser.channels=[32]", "policy.denoiser.time_dim=16", "train.validate_every=0"]
    net += ["policy.encoder.width=0.25", "policy.encoder.stages=1", "policy.encoder.group_norm_channels=4"]
    run = [f"data={data}", f"output_dir={folder}", f"train.max_steps={steps}", "train.tensorboard=false", "device=cpu"]
    seen = "task.observations={state: {}, depth: {kind: depth}}"
    return load("train", ["task=custom", *sizes, *net, *run, seen, "evaluation.n_episodes=0", *options])


@pytest.mark.slow
def test_a_policy_sees_how_far_things_are(tmp_path: Path) -> None:
    options = ["policy.encoder.crop=[14,18]", "policy.encoder.pooling=average"]
    train(configured(recorded(tmp_path / "a.zarr"), tmp_path / "run", *options, steps=250))
    policy = bundles.load(tmp_path / "run/bundle", verify=True)
    seen = policy.spec.observations["depth"]
    assert (seen.kind, seen.dtype, seen.shape) == ("depth", "uint16", (HEIGHT, WIDTH))
    assert policy.spec.camera_order == []
    assert policy.spec.buffer_columns["depth"] == f"observed: depth of {WIDTH} × {HEIGHT} pixels"
    statistics = policy.spec.normalizer["depth"]
    assert statistics["kind"] == "gaussian"
    assert statistics["min"][0] > 250  # of what is known
    distance = np.linspace(350, 850, 64)
    depth = frames(distance, np.random.default_rng(1))[:, None]
    obs = {"state": np.zeros((64, 1, 1), np.float32), "depth": depth}
    action = policy.predict(obs)["action"].ravel()
    assert np.corrcoef(action, distance)[0, 1] > 0.9
    np.testing.assert_array_equal(policy.predict(obs | {"depth": depth.astype(np.float32)})["action"].shape, (64, 1, 1))


def test_unknown_depth_is_as_the_mean_and_marked(tmp_path: Path) -> None:
    train(configured(recorded(tmp_path / "a.zarr"), tmp_path / "run"))
    policy = bundles.load(tmp_path / "run/bundle")
    scale, offset = (policy.spec.normalizer["depth"][name][0] for name in ("scale", "offset"))
    mean = -offset / scale
    far = policy._far("depth", torch.tensor([[[[0, round(mean)], [round(mean + 1 / scale), 1]]]], dtype=torch.int32))
    assert far[0, 0, 0, 0].tolist() == [0, 0]
    assert far[0, 0, ..., 1].flatten().tolist() == [0, 1, 1, 1]
    assert far[0, 0, ..., 0].flatten()[1:].tolist() == pytest.approx([0, 1, scale + offset], abs=0.02)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lambda depth: depth / np.float32(1000), "of float32, depth must be uint16 .N, H, W. in mm"),
        (lambda depth: depth[:, 0], "depth must be uint16"),
        (lambda depth: depth * 0, "all of the depth is 0, which means that it is unknown"),
    ],
)
def test_what_is_no_depth(column: Any, message: str, tmp_path: Path) -> None:
    data = recorded(tmp_path / "a.zarr", depth=column)
    with pytest.raises(InputError, match=message):
        train(configured(data, tmp_path / "run"))


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 1), (1, HEIGHT, WIDTH)])
def test_its_arrays_are_those_of_the_file(shape: tuple[int, ...], tmp_path: Path) -> None:
    depth = np.random.default_rng(0).integers(0, 2**16, (5, *shape), dtype=np.uint16)
    ReplayBuffer.from_arrays({"depth": depth}, [5]).save(tmp_path / "a.zarr")
    buffer, key = ReplayBuffer.open(tmp_path / "a.zarr"), ObsKey("depth", None, "depth")
    expected = depth.reshape(5, HEIGHT, WIDTH)
    for found in (load_column(buffer, key), load_cached(buffer, key, tmp_path / "cache")):
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, expected)


def test_the_encoder_crops_it_and_has_a_network_for_it() -> None:
    torch.manual_seed(0)
    encoder = ObservationEncoder(
        image_keys=["top"], image_shapes={"top": (32, 40, 3)}, state_dims={"state": 3}, n_obs_steps=2, width=0.25,
        stages=1, feature_dim=8, crop=[28, 36], depth_shapes={"wrist": (32, 40)},
    ).eval()  # fmt: skip
    obs = {"state": torch.zeros(2, 2, 3), "top": torch.zeros(2, 2, 32, 40, 3, dtype=torch.uint8)}
    obs["wrist"] = torch.randn(2, 2, 32, 40, 2)
    found = encoder(obs)
    assert found.shape == (2, encoder.output_dim) == (2, 2 * (3 + 8 + 8))
    assert encoder.depths.get_parameter("0.backbone.0.weight").shape[1] == 2
    obs["wrist"] = obs["wrist"].clone()
    obs["wrist"][:, :, :, 0] = 100.0  # beyond the crop
    torch.testing.assert_close(encoder(obs), found)
    obs["wrist"][:, 0] += 1  # the first step
    steps, before = encoder(obs).view(2, 2, 19), found.view(2, 2, 19)
    torch.testing.assert_close(steps[:, 1], before[:, 1])
    assert not torch.allclose(steps[:, 0, 11:], before[:, 0, 11:])
    with pytest.raises(InputError, match=r"depth .wrist. is float32 .2, 2, 5, 5., expected float32 .B, 2, 32, 40, 2."):
        encoder(obs | {"wrist": torch.zeros(2, 2, 5, 5)})
