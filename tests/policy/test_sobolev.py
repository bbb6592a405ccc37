"""Feedback gains in the loss: what neighbours of demonstrations are, and that a policy which has the gains loses
nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy
from torch import Tensor

from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.errors import InputError
from action_diffusion.options import configuration
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.bundle import load
from action_diffusion.policy.diffusion.process import Diffusion, Flow, Process
from action_diffusion.policy.objectives.sobolev import Sobolev
from action_diffusion.policy.spec import ObservationSpec
from action_diffusion.training.run import train

SOBOLEV = {"name": "sobolev", "weight": 2.0}
GAIN = torch.tensor([[1.0, -2.0, 0.0, 0.5, 0.0], [0.0, 3.0, 0.2, 0.0, -1.0]])


def batch(n: int = 64) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Observations [n, 2, 5], chunks [n, 8, 2] whose step now is GAIN times the observation now, and gains."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(n, 2, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 0.0])
    action = torch.randn(n, 8, 2, generator=generator)
    action[:, 1] = state[:, 1] @ GAIN.T
    return {"state": state}, action, GAIN.expand(n, 2, 5)


def test_neighbours_follow_the_gains() -> None:
    obs, action, gain = batch()
    beside, chunks = Sobolev().neighbours(obs, ["state"], action, gain, torch.Generator().manual_seed(1))
    torch.testing.assert_close(chunks[:, 1], beside["state"][:, 1] @ GAIN.T, atol=1e-4, rtol=1e-4)
    after, before = beside["state"].chunk(2)
    torch.testing.assert_close((after + before) / 2, obs["state"])
    assert torch.equal(after[:, 0], obs["state"][:, 0])  # what was observed before now stays
    assert torch.equal(chunks[:64, 2:], action[:, 2:])
    shift = (after - before)[:, 1] / 2
    spread = obs["state"][:, 1].std(dim=0, correction=0) * Sobolev.STEP / 5**0.5
    assert torch.equal(shift[:, 4], torch.zeros(64))  # what never changes
    torch.testing.assert_close(shift.std(dim=0)[:4], spread[:4], atol=0.0, rtol=0.3)


@pytest.mark.parametrize("process", [Diffusion(prediction="sample"), Diffusion(), Flow(), Flow(prediction="sample")])
def test_a_denoiser_that_has_the_gains_moves_alike(process: Process) -> None:
    """The exact output for a chunk that is GAIN times the observation; another one's slope is off by what its gains
    are."""
    obs, action, gain = batch()
    objective, generator = Sobolev(), torch.Generator().manual_seed(1)
    beside, chunks = objective.neighbours(obs, ["state"], action, gain, generator)
    clean = torch.cat([beside["state"][:, 1:] @ GAIN.T] * 8, dim=1)

    def slopes(scale: float) -> tuple[Tensor, Tensor]:
        noises: list[Tensor] = []

        def network(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
            noise = process.add_noise(torch.zeros_like(x), torch.ones_like(x), times)
            signal = process.add_noise(torch.ones_like(x), torch.zeros_like(x), times)
            noises.append(eps := (x - signal * chunks) / noise)
            return process.target(scale * clean, eps, times)

        pair = objective.slopes(network, process, chunks, 1, torch.Generator().manual_seed(2))
        first, second = noises[0].chunk(2)
        assert torch.allclose(first, second, atol=1e-3)  # the same noise for both
        return pair.output, pair.target

    output, target = slopes(1.0)
    assert output.shape == (64, 1, 2)
    torch.testing.assert_close(output, target, atol=2e-2, rtol=1e-2)
    if process.prediction == "sample":
        moved = (beside["state"][:64] - beside["state"][64:])[:, 1] @ GAIN.T / (2 * Sobolev.STEP)
        torch.testing.assert_close(slopes(1.5)[0][:, 0], 1.5 * moved, atol=1e-3, rtol=1e-3)


def test_the_loss_is_of_actions_and_of_slopes() -> None:
    buffer = demonstrations()
    policy = tiny_policy(buffer, objective=SOBOLEV)
    plain = tiny_policy(buffer)
    obs = {"state": torch.from_numpy(buffer["state"][:64]).view(32, 2, 5)}
    action = torch.from_numpy(buffer["action"][:64]).view(8, 8, 2).repeat(4, 1, 1)
    seeded = torch.Generator().manual_seed
    still = torch.zeros(32, 2, 5)
    loss = policy(obs, action, gain=still, generator=seeded(0))
    assert loss > plain(obs, action, generator=seeded(0))
    assert torch.equal(loss, policy(obs, action, gain=still.flatten(1), generator=seeded(0)))
    assert not torch.equal(loss, policy(obs, action, gain=still + 5, generator=seeded(0)))
    with pytest.raises(InputError, match="learns from gains, and none are given"):
        policy(obs, action)
    with pytest.raises(InputError, match=r"gains of shape \[5, 5\], expected \[2, 5\]: .* 5 values of state"):
        policy(obs, action, gain=torch.zeros(32, 5, 5))


def test_a_batch_has_the_gains_of_now() -> None:
    n = 20
    buffer = demonstrations(2, 10).with_column("gain", np.arange(n * 10, dtype=np.float32).reshape(n, 2, 5))
    windows = make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4)
    source = BatchSource(
        buffer=buffer,
        windows=windows,
        observations={"state": ObsKey("state", None, "state")},
        action_key="action",
        gain_key="gain",
        n_obs_steps=2,
    )
    found = source.gather(np.array([0, 3])).gain
    assert found is not None
    assert found[:, 0].tolist() == [10.0 * row for row in windows.now(np.array([0, 3]))]


def words(data: object, *more: str) -> list[str]:
    return [
        *("task=custom", "encoder=state", "objective=sobolev", f"data={data}", "device=cpu", "train.max_steps=2"),
        *("train.batch_size=8", "train.tensorboard=false", "evaluation.n_episodes=0", *more),
    ]


@pytest.mark.slow
def test_gains_of_a_buffer_are_learnt_from_and_not_observed(tmp_path) -> None:
    gain = np.zeros((80, 2, 5), np.float32)
    demonstrations(4, 20).with_column("feedback", gain).save(tmp_path / "a.zarr")
    named = words(tmp_path / "a.zarr", "policy.objective.gain=feedback", f"output_dir={tmp_path / 'run'}")
    train(configuration.load("train", named))
    spec = load(tmp_path / "run" / "bundle").spec
    assert list(spec.observations) == ["state"]
    assert spec.buffer_columns["feedback"] == "feedback gains: 10 values, [2, 5] as one vector, the last axis fastest"


@pytest.mark.parametrize(
    ("gain", "message"),
    [
        (None, "unknown key of the buffer for policy.objective.gain"),
        (np.zeros((80, 5), np.float32), r"gains of shape \[5\], expected \[2, 5\]"),
        (np.full((80, 2, 5), np.nan, np.float32), "NaN|finite"),
    ],
)
def test_gains_that_cannot_be(gain: np.ndarray | None, message: str, tmp_path) -> None:
    buffer = demonstrations(4, 20)
    (buffer if gain is None else buffer.with_column("gain", gain)).save(tmp_path / "a.zarr")
    with pytest.raises(InputError, match=message):
        train(configuration.load("train", words(tmp_path / "a.zarr", f"output_dir={tmp_path / 'run'}")))


def test_cameras_have_no_gains() -> None:
    spec = tiny_policy(demonstrations()).spec
    seen = spec.observations | {"front": ObservationSpec(shape=(16, 16, 3), dtype="uint8", kind="image")}
    config = TINY | {"objective": SOBOLEV, "encoder": {"name": "observation", "stages": 1}}
    with pytest.raises(InputError, match="sobolev is for states, and the policy sees front"):
        build_policy(config, replace(spec, observations=seen))
