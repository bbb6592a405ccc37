"""Points as an observation: a cloud in one frame, of which neither order nor repetition matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder
from action_diffusion.training.run import train

P = 12


def clouds(place: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """float32 [n, P, 3]: points around `place` [n, 3]."""
    return (place[:, None] + random.normal(0, 0.02, (len(place), P, 3))).astype(np.float32)


def configured(tmp_path: Path, cloud: Any = lambda values: values, *options: str, steps: int = 2) -> dict[str, Any]:
    """The action is where the middle of the cloud is."""
    random, buffer = np.random.default_rng(0), ReplayBuffer.create(tmp_path / "a.zarr", attrs={"control_rate": 10})
    for _ in range(6):
        place = random.uniform(-0.3, 0.3, (20, 3))
        state = random.normal(size=(20, 1)).astype(np.float32)
        buffer.append({"state": state, "cloud": cloud(clouds(place, random)), "action": place.astype(np.float32)})
    sizes = ["task.horizon=4", "task.n_obs_steps=1", "task.n_action_steps=1", "train.batch_size=16", "train.lr=3e-3"]
    net = ["policy.denoiser.channels=[32]", "policy.denoiser.time_dim=16", "train.validate_every=0"]
    net += ["policy.encoder.points={hidden: [32, 32], feature_dim: 16}"]
    run = [f"data={tmp_path}/a.zarr", f"output_dir={tmp_path}/run", f"train.max_steps={steps}", "device=cpu"]
    seen = "task.observations={state: {}, cloud: {kind: points}}"
    quiet = ["train.tensorboard=false", "evaluation.n_episodes=0"]
    return load("train", ["task=custom", *sizes, *net, *run, seen, *quiet, *options])


@pytest.mark.slow
def test_a_policy_sees_where_points_are(tmp_path: Path) -> None:
    train(configured(tmp_path, steps=250))
    policy = bundles.load(tmp_path / "run/bundle", verify=True)
    assert policy.spec.observations["cloud"].shape == (P, 3)
    assert policy.spec.buffer_columns["cloud"] == f"observed: {P} points"
    assert len(policy.spec.normalizer["cloud"]["scale"]) == 3  # of all points together
    random = np.random.default_rng(1)
    place = random.uniform(-0.25, 0.25, (64, 3))
    obs = {"state": np.zeros((64, 1, 1), np.float32), "cloud": clouds(place, random)[:, None]}
    with torch.inference_mode():
        condition = policy.encode({key: torch.from_numpy(value) for key, value in obs.items()})
        other = policy.encode(
            {"state": torch.zeros(64, 1, 1), "cloud": torch.from_numpy(obs["cloud"][:, :, ::-1].copy())}
        )
    torch.testing.assert_close(condition, other)
    action = policy.predict(obs)["action"][:, 0]
    assert np.corrcoef(action.ravel(), place.ravel())[0, 1] > 0.9


def test_the_encoder_takes_the_maximum_over_points() -> None:
    torch.manual_seed(0)
    encoder = ObservationEncoder(
        image_keys=[], image_shapes={}, state_dims={"state": 3}, n_obs_steps=2, point_shapes={"cloud": (5, 6)},
        points={"hidden": [8, 16], "feature_dim": 4},
    )  # fmt: skip
    obs = {"state": torch.randn(2, 2, 3), "cloud": torch.randn(2, 2, 5, 6)}
    found = encoder(obs)
    assert found.shape == (2, encoder.output_dim) == (2, 2 * (3 + 4))
    again = obs["cloud"][:, :, [4, 2, 0, 1, 3]]
    torch.testing.assert_close(encoder(obs | {"cloud": again}), found)
    twice = torch.cat([obs["cloud"][:, :, :4], obs["cloud"][:, :, :1]], dim=2)
    other = torch.cat([obs["cloud"][:, :, :4], obs["cloud"][:, :, 1:2]], dim=2)
    torch.testing.assert_close(encoder(obs | {"cloud": twice}), encoder(obs | {"cloud": other}))
    layers = encoder.points.get_submodule("0.layers")(obs["cloud"])
    by_hand = encoder.points.get_submodule("0.out")(layers.max(dim=2).values)
    torch.testing.assert_close(found.view(2, 2, 7)[..., 3:], by_hand)
    with pytest.raises(InputError, match=r"points 'cloud' is float32 .2, 2, 5, 3., expected float32 .B, 2, 5, 6."):
        encoder(obs | {"cloud": torch.zeros(2, 2, 5, 3)})


@pytest.mark.parametrize(
    ("cloud", "options", "message"),
    [
        (lambda cloud: cloud[:, :, :2], [], r"points must be floats .N, P, 3., or .N, P, 6."),
        (lambda cloud: np.rint(cloud).astype(np.int32), [], "of int32, points must be floats"),
        (lambda cloud: cloud * np.float32("nan"), [], "NaN"),
        (lambda cloud: cloud, ["policy.features.cloud={name: sin_cos, columns: [0]}"], "state in policy.features"),
    ],
)
def test_what_is_no_cloud(cloud: Any, options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(configured(tmp_path, cloud, *options))
