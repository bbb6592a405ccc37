"""The guard: its scores against known answers, its thresholds, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion import cli
from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.diffusion.masked import Masked
from action_diffusion.policy.diffusion.process import Diffusion, Flow, Mip
from action_diffusion.policy.extensions.extension import Fitted, write
from action_diffusion.policy.extensions.guard import THRESHOLDS, Guard, grid, reached
from action_diffusion.policy.extensions.watch import Watch
from action_diffusion.policy.model.denoisers.denoiser import Film

OPTIONS = {"seed": 0, "chunk": True, "quantile": 0.9, "episodes": 0.5, "sigmas": [0.1, 0.5]}


def source(buffer, episodes) -> BatchSource:
    windows = make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4, episodes=episodes)
    keys = {"state": ObsKey("state", None, "state")}
    return BatchSource(buffer=buffer, windows=windows, observations=keys, action_key="action", n_obs_steps=2)


@pytest.fixture(scope="module")
def fitted():
    buffer = demonstrations(12)
    policy = tiny_policy(buffer)
    return policy, Guard.fit(policy, source(buffer, np.arange(8)), source(buffer, np.arange(8, 12)), OPTIONS)


def test_the_chunk_score_is_the_error_of_the_denoised_chunk(fitted, monkeypatch):
    """A denoiser that always says the clean chunk 0.25: the error is (0.25 − a) / σ at every level."""
    policy = tiny_policy(demonstrations(12), process={"name": "diffusion", "prediction": "sample"})
    guard = Guard(policy, fitted[1])
    monkeypatch.setattr(policy.denoiser, "forward", lambda x, film: torch.full_like(x, 0.25))
    sigmas = fitted[1].arrays["grid"][:, 2] / fitted[1].arrays["grid"][:, 1]
    condition = torch.zeros(2, fitted[1].arrays["scale"].shape[0])
    found = guard.chunk_score(condition, torch.stack([torch.zeros(8, 2), torch.full((8, 2), 0.25)]))
    np.testing.assert_allclose(found, [0.25 * np.sqrt((1 / sigmas**2).mean()), 0.0], rtol=1e-5, atol=1e-7)


def test_each_level_and_row_has_its_own_noise_and_film(fitted, monkeypatch):
    """Rows of the one call are level after level: x = a chunk + b n, with the film of that level and that condition."""
    policy, found = fitted
    guard, calls = Guard(policy, found), []

    def forward(x, film):
        calls.append((x, film))
        return torch.zeros_like(x)

    monkeypatch.setattr(policy.denoiser, "forward", forward)
    condition, chunks = torch.randn(3, len(found.arrays["scale"])), torch.randn(3, 8, 2)
    guard.chunk_score(condition, chunks)
    (x, film), levels = calls[0], found.arrays["grid"]
    whole: Film = policy.denoiser.prepare(condition, torch.from_numpy(levels[:, 0]))
    for row, level in ((0, 0), (2, 0), (1, 1)):
        expected = levels[level, 1] * chunks[row] + levels[level, 2] * torch.from_numpy(found.arrays["noise"][level])
        torch.testing.assert_close(x[3 * level + row], expected)
        torch.testing.assert_close(film[3 * level + row], whole.steps[level] + whole.condition[row])


def test_the_observation_score_is_the_distance_to_the_nearest_condition(fitted):
    policy, found = fitted
    guard, scale = Guard(policy, found), found.arrays["scale"]
    known = torch.from_numpy(found.arrays["conditions"])
    step = torch.zeros_like(known[0])
    step[3] = 500.0 * float(scale[3])
    score = guard.observation_score(torch.stack([known[5], known[5] + step]))
    distance = np.sqrt((((known[5] + step).numpy() - found.arrays["conditions"]) ** 2 / scale**2).sum(axis=1)).min()
    np.testing.assert_allclose(score, [0.0, distance], rtol=1e-4, atol=2e-2)


def test_thresholds_are_quantiles_of_held_out_demonstrations(fitted):
    found, buffer, guard = fitted[1], demonstrations(12), Guard(*fitted)
    held_out = source(buffer, np.arange(8, 12))
    observation, chunk = guard.scores(held_out, np.arange(len(held_out)))
    assert found.options["windows"] == len(held_out)
    for scores, name in ((observation, "observation"), (chunk, "chunk")):
        assert guard.thresholds[name] == pytest.approx(reached(scores, 0.9), rel=1e-5)
        assert (scores > guard.thresholds[name] * 1.0001).mean() <= 0.1


@pytest.mark.parametrize(("n", "quantile", "rank"), [(99, 0.99, 99), (100, 0.9, 91), (10, 0.99, 10), (1, 0.5, 1)])
def test_a_quantile_counts_the_new_one(n, quantile, rank):
    assert reached(np.random.default_rng(0).permutation(n) + 1.0, quantile) == rank


def test_the_watch_sums_up_what_is_above_0():
    watch = Watch()
    taken = [(watch.take(level), round(watch.sum, 6)) for level in (-3.0, 0.6, -0.2, 0.5, 0.2, 0.1)]
    assert taken == [(False, 0.0), (False, 0.6), (False, 0.4), (False, 0.9), (True, 1.1), (True, 1.2)]
    assert [watch.take(level) for level in (0.01, -0.01, 0.9)] == [True, False, False]
    assert watch.sum == 0.9
    watch.reset()
    assert (watch.sum, watch.alarm) == (0.0, False)
    assert watch.take(float("nan"))
    assert not watch.take(-1.0)


def test_held_out_episodes_alarm_as_seldom_as_was_asked_for(fitted):
    """Half of four, by the conformal rank: at least three of them stay silent."""
    guard, buffer = Guard(*fitted), demonstrations(12)
    assert fitted[1].options["held_out_episodes"] == 4
    alarms = 0
    for episode in range(8, 12):
        held_out, watch = source(buffer, np.array([episode])), Watch()
        observation, _ = guard.scores(held_out, np.arange(0, len(held_out), 4))
        levels = guard.level(torch.from_numpy(observation / guard.thresholds["observation"])) - 1e-6
        alarms += any([watch.take(float(level)) for level in levels])
    assert alarms <= 1


@pytest.mark.parametrize(
    ("process", "sigmas", "expected"),
    [
        (Flow(), (0.25, 1.0), (0.25, 1.0)),
        (Diffusion(), (1.0,), (1.0,)),
        (Mip(), (0.1, 1.0), (1 / 9, 1 / 9)),
    ],
)
def test_levels_are_those_of_the_process(process, sigmas, expected):
    found = grid(process, sigmas)
    np.testing.assert_allclose(found[:, 2] / found[:, 1], expected, rtol=0.03)
    eps = torch.ones(len(found), 1, 1)
    x = process.add_noise(2 * eps, eps, torch.from_numpy(found[:, 0]))
    np.testing.assert_allclose(x.flatten(), 2 * found[:, 1] + found[:, 2], rtol=1e-5)


def test_a_process_without_noise_is_refused():
    with pytest.raises(InputError, match="a masked process adds no noise"):
        grid(Masked(), [0.1])


def test_it_notes_every_row_and_leaves_the_chunk_alone(fitted, tmp_path):
    policy, found = fitted
    bundles.save(tmp_path / "bundle", policy, {"policy": TINY})
    write(tmp_path / "bundle", "guard", found)
    obs = {"state": demonstrations()["state"][:].reshape(-1, 2, 5)[:3]}
    noise = np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32)
    plain = bundles.load(tmp_path / "bundle").predict(obs, noise=noise)
    guarded = bundles.load(tmp_path / "bundle", extensions=["guard"])
    together = guarded.predict(obs, noise=noise)
    np.testing.assert_array_equal(together["action_pred"], plain["action_pred"])
    alone = guarded.predict({"state": obs["state"][2]}, noise=noise[2:])
    for name in ("guard.observation", "guard.chunk", "guard.level"):
        assert together[name].shape == (3,)
        np.testing.assert_allclose(alone[name], together[name][2], rtol=1e-3)
    far = guarded.predict({"state": obs["state"] + 1000}, noise=noise)
    assert (far["guard.level"] > together["guard.level"] + 10).all()


def test_the_episode_that_is_unlike_the_others_is_ranked_first(fitted):
    """One episode is moved away from its row 20 on; that it is in the buffer itself makes it no more usual."""
    buffer = demonstrations(12)
    state, action = buffer["state"][:].copy(), buffer["action"][:].copy()
    state[5 * 40 + 20 : 6 * 40, :2] += 500
    action[5 * 40 + 20 : 6 * 40] += 500
    moved = ReplayBuffer.from_arrays({"state": state, "action": action}, buffer.episode_ends)
    ranked = Guard(*fitted).ranked(source(moved, np.arange(12)))
    assert sorted(one.episode for one in ranked) == list(range(12))
    assert ranked[0].episode == 5
    assert ranked[0].level > 2 * ranked[1].level
    assert 5 * 40 + 20 <= ranked[0].row < 6 * 40
    with pytest.raises(InputError, match="there are none"):
        Guard(*fitted).ranked(source(buffer, np.array([3])))


def test_the_doctor_ranks_episodes(fitted, tmp_path, capsys):
    buffer = demonstrations(4)
    buffer.save(tmp_path / "demos.zarr")
    bundle = tmp_path / "bundle"
    bundles.save(bundle, fitted[0], {"policy": TINY})
    words = ["data", "doctor", str(tmp_path / "demos.zarr"), f"bundle={bundle}"]
    assert cli.main(words) == 2
    assert "action-diffusion fit guard" in capsys.readouterr().err
    write(bundle, "guard", fitted[1])
    assert cli.main(words) in (0, 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("episode ")]
    assert sorted(line.split(":")[0] for line in lines) == [f"episode {index}" for index in range(4)]


def test_a_policy_that_is_told_of_delays_is_scored_without_any(fitted):
    policy = tiny_policy(demonstrations(12), objective={"loss": "mse", "max_delay": 2})
    score = Guard(policy, fitted[1]).chunk_score(torch.zeros(1, len(fitted[1].arrays["scale"])), torch.zeros(1, 8, 2))
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("damage", ["lacks", "shape", "dtype", "zero"])
def test_what_was_not_fitted_is_refused(fitted, damage):
    policy, found = fitted
    arrays = dict(found.arrays)
    if damage == "lacks":
        del arrays["grid"]
    elif damage == "shape":
        arrays["conditions"] = arrays["conditions"][:, 1:]
    elif damage == "dtype":
        arrays["noise"] = arrays["noise"].astype(np.float64)
    else:
        arrays["thresholds"] = np.zeros(len(THRESHOLDS), np.float32)
    with pytest.raises(InputError, match="extension guard"):
        Guard(policy, Fitted(found.options, arrays))
