"""Episodes that are put together: what models of what comes before and after learn from, what is refused, and what is
written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options.data import Augment
from action_diffusion.training.augmenting import Episodes, Filter, Joints, apart, augment, inverse_and_forward, windows


def chain(n: int = 24, length: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Points that go right along x by half of the action: half of the episodes end where the others begin, at x = 0."""
    random = np.random.default_rng(seed)
    steps = random.uniform(0.06, 0.14, (n, length))
    first = np.where(np.arange(n) % 2, 0.0, -steps[:, 1:].sum(axis=1))
    x = first[:, None] + np.cumsum(steps, axis=1) - steps
    y = random.uniform(-0.3, 0.3, n)[:, None] + np.zeros(length)
    states = np.stack([x, y], axis=2)
    action = np.stack([2 * steps, np.zeros_like(steps)], axis=2).reshape(-1, 2)
    columns = {"state": states.reshape(-1, 2), "action": action, "goal": np.repeat(states[:, -1], length, axis=0)}
    return {key: value.astype(np.float32) for key, value in columns.items()}


def buffer(**changes: Any) -> ReplayBuffer:
    columns = chain() | changes
    return ReplayBuffer.from_arrays(columns, 8 * np.arange(1, 25), {"control_rate": 10.0})


def episodes() -> Episodes:
    columns = chain()
    return Episodes(columns["state"], columns["action"], 8 * np.arange(1, 25))


def options(**changes: Any) -> Augment:
    given: dict[str, Any] = {"in_": "a.zarr", "out": "b.zarr", "episodes": 8, "horizon": 8, "steps": 60}
    return Augment(**given | changes)


def test_windows_of_what_comes_after_and_before() -> None:
    given = episodes()
    after, before = windows(given, 4, backward=False), windows(given, 4, backward=True)
    assert after.shape == before.shape == (192, 4, 3)
    np.testing.assert_allclose(after[0, :, :2].cumsum(axis=0), given.states[1:5] - given.states[0], atol=1e-6)
    np.testing.assert_array_equal(after[5, :, 2], [1, 1, 0, 0])
    assert not after[5, 2:, :2].any()
    np.testing.assert_array_equal(before[10, :2, :2], given.states[[9, 8]] - given.states[[10, 9]])
    assert not before[10, 2:, :2].any()
    np.testing.assert_array_equal(before[10, :, 2], [1, 1, 0, 0])
    assert not before[8, :, 2].any()
    assert not after[15, :, 2].any()


@pytest.mark.slow
def test_dynamics_are_learnt_from_steps_within_episodes() -> None:
    """A step moves by half of the action: exact in the data, which the linear part finds."""
    random = np.random.default_rng(0)
    states, actions, ends = [], [], []
    for _ in range(20):
        at = random.normal(size=2)
        for _ in range(20):
            states.append(at)
            actions.append(random.uniform(-1, 1, 2))
            at = at + 0.5 * actions[-1]
        ends.append(len(states))
    given = Episodes(np.array(states, np.float32), np.array(actions, np.float32), np.array(ends))
    act, after = inverse_and_forward(given, options(steps=300))
    start = random.normal(size=(50, 2)).astype(np.float32)
    action = random.uniform(-0.9, 0.9, (50, 2)).astype(np.float32)
    np.testing.assert_allclose(after(start, action), start + 0.5 * action, atol=0.03)
    np.testing.assert_allclose(act(start, start + 0.5 * action), action, atol=0.06)
    far = act(start, start + 10)  # no demonstrated action does that
    assert np.abs(far).max() <= 1.1


def test_what_cannot_be_is_refused() -> None:
    given = episodes()
    accept = Filter(given, lambda states, actions: states + 0.5 * actions, 0.25, apart(given))
    states = given.states[:8]
    actions = given.actions[:7]
    assert accept(states, actions)
    jumped = states.copy()
    jumped[4:] += [0.2, 0.0]
    assert not accept(jumped, actions)  # the dynamics say otherwise
    aside = states + np.array([0.0, 0.9], np.float32)
    assert not accept(aside, actions)  # nothing was ever there


def test_only_pairs_that_no_demonstration_has_are_put_together() -> None:
    """On a line, half of them end at x = 0, where the others begin: what is new goes from before -0.4 to after 0.4."""
    given = episodes()
    given.states[:, 1] = 0.0
    anchors, begins, ends = Joints(given, "ends", apart(given)).draw(300, np.random.default_rng(0))
    assert len(anchors) == 300
    assert (np.abs(anchors[:, 0]) < 0.1).all()
    assert (begins[:, 0] < -0.4).all()
    assert (ends[:, 0] > 0.4).all()
    given.states.reshape(24, 8, 2)[1::2, :, 0] += 5.0  # nothing meets any more
    for where, hint in (("ends", "end where another one begins"), ("all", "they have to cross")):
        with pytest.raises(InputError, match=f"no two demonstrations meet .*{hint}"):
            Joints(given, where, apart(given)).draw(1, np.random.default_rng(0))


@pytest.mark.slow
def test_new_episodes_go_from_where_one_begins_to_where_another_ends(tmp_path: Path) -> None:
    buffer(extra=np.zeros((192, 3), np.float32)).save(tmp_path / "a.zarr")
    out = tmp_path / "b.zarr"
    given = options(in_=str(tmp_path / "a.zarr"), out=str(out), goal="goal", steps=250, tolerance=0.6)
    report = augment(given, dynamics=lambda states, actions: states + 0.5 * actions)
    made = ReplayBuffer.open(out)
    assert report["left_out"] == "extra"
    assert report["generated"] == made.n_episodes - 24 == 8
    flags, states = made["generated"][:], made["state"][:]
    np.testing.assert_array_equal(flags, np.arange(made.n_steps) >= 192)
    np.testing.assert_array_equal(states[:192], chain()["state"])
    starts = np.concatenate([[0], made.episode_ends[:-1]])[24:]
    lengths = states[made.episode_ends[24:] - 1, 0] - states[starts, 0]
    assert np.median(lengths) > 0.75  # a demonstration is 0.7 long
    goals = made["goal"][:]
    for start, end in zip(starts, made.episode_ends[24:], strict=True):
        assert (goals[start:end] == goals[start]).all()
        np.testing.assert_allclose(goals[start, 0], states[end - 1, 0] + 0.1, atol=0.15)
    assert made.attrs["provenance"][-1]["what"] == "augment episodes=8 horizon=8 seed=0"
    assert made.rate == 10.0


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({"goal": "goals"}, {}, "no key 'goals'"),
        ({"goal": "action"}, {"action": np.zeros((192, 3), np.float32)}, "goal=action has 3 values, expected the 2 of"),
        ({"state": "x"}, {"x": np.zeros((192, 4, 4, 3), np.uint8)}, r"state=x has shape \[192, 4, 4, 3\], expected"),
        ({}, {"state": np.full((192, 2), np.nan, np.float32)}, "data/state is NaN at row 0"),
        ({"tolerance": 1e-6, "steps": 1, "episodes": 1}, {}, "none of .* imagined episodes passes the filter"),
    ],
)
def test_what_cannot_be_augmented(
    changes: dict[str, Any], columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    buffer(**columns).save(tmp_path / "a.zarr")
    with pytest.raises(InputError, match=message):
        augment(options(in_=str(tmp_path / "a.zarr"), out=str(tmp_path / "b.zarr"), **changes))
    assert not (tmp_path / "b.zarr").exists()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer().save(tmp_path / "a.zarr")
    words = ["data", "augment", f"in={tmp_path / 'a.zarr'}"]
    for more, message in (
        ([f"out={tmp_path / 'a.zarr'}"], "exists: choose another path"),
        ([f"out={tmp_path / 'b.zarr'}", "horizon=7"], "horizon=7"),
        ([f"out={tmp_path / 'b.zarr'}", "episode=7"], "did you mean episodes"),
        ([], "out is required"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
