"""Constraints: the geometry against cases with known answers, the guarantee, the data's units, bad limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.errors import InputError
from action_diffusion.options.extensions import FITS
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.constraint import Box, Constraint, Disc, Region
from action_diffusion.policy.extensions.extension import Fitted, write

WIDE: dict[str, Any] = {"low": torch.tensor([-100.0, -100.0]), "high": torch.tensor([100.0, 100.0])}
UNIT = Disc(torch.tensor([0.0, 0.0]), 1.0)
RIGHT = torch.tensor([[1.0, 0.0]])


def options(**given):
    return vars(FITS["constraint"](bundle="b", **given))


def words(**given):
    own = set(options()) - {"bundle", "data", "seed", "device", "plugins"}
    return {name: value for name, value in options(**given).items() if name in own}


def test_the_way_out_of_a_disc():
    places = torch.tensor([[0.0, 0.0], [0.0, 0.6], [-0.5, 0.0], [2.0, 0.0]])
    expected = torch.tensor([[1.0], [0.8], [1.5], [0.0]])
    torch.testing.assert_close(UNIT.way_out(places, RIGHT), expected)


def test_the_way_out_of_a_box():
    box = Box(torch.tensor([0.0, 0.0]), torch.tensor([4.0, 2.0]))
    slanted = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)]])
    places = torch.tensor([[1.0, 1.0], [5.0, 1.0]])
    torch.testing.assert_close(box.way_out(places, RIGHT), torch.tensor([[3.0], [0.0]]))
    torch.testing.assert_close(box.way_out(places, slanted), torch.tensor([[math.sqrt(2.0)], [0.0]]))


@pytest.mark.parametrize("obstacle", [UNIT, Box(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]))])
def test_a_line_that_passes_through_hits_though_its_ends_are_outside(obstacle):
    first = torch.tensor([[-2.0, 0.0], [-2.0, 1.1], [-3.0, 0.0], [0.0, -2.0]])
    second = torch.tensor([[2.0, 0.0], [2.0, 1.1], [-2.0, 0.0], [0.0, 3.0]])
    assert obstacle.hit(first, second).tolist() == [True, False, False, True]


def test_a_path_that_crosses_goes_round_on_one_side():
    """Its own: a radial way out would throw the beginning back and the end forward, and leave the line between."""
    x = torch.linspace(-2, 2, 21)
    path = torch.stack([x, torch.full_like(x, 0.2)], dim=-1).unsqueeze(0)
    region = Region([UNIT], **WIDE)
    found = region.push(path, path[:, 0])[0]
    torch.testing.assert_close(found[:, 0], x, atol=0.1, rtol=0)
    torch.testing.assert_close(found[10], torch.tensor([0.0, 1.0]), atol=0.02, rtol=0)
    assert (found[:, 1] >= 0.2 - 1e-6).all()
    assert not UNIT.grown(-0.02).hit(found[:-1], found[1:]).any()


def test_what_is_allowed_stays_as_it_is():
    path = torch.tensor([[[2.0, 0.0], [2.0, 1.0], [2.0, 2.0]]])
    region = Region([UNIT], **WIDE, step=1.5)
    torch.testing.assert_close(region.walk(region.push(path, path[:, 0]), path[:, 0]), path, atol=0, rtol=0)


def test_the_nearest_allowed_place_of_a_single_action():
    path = torch.tensor([[[0.5, 0.0]], [[0.0, -0.25]]])
    found = Region([UNIT], **WIDE).walk(path, None)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.0]], [[0.0, -1.0]]]), atol=1e-3, rtol=0)


def test_speed_is_kept_from_where_the_arm_is():
    path = torch.tensor([[[10.0, 0.0], [10.0, 0.0]]])
    region = Region([], **WIDE, step=2.0, further=1.0)
    found = region.walk(path, torch.zeros(1, 2))
    torch.testing.assert_close(found, torch.tensor([[[3.0, 0.0], [5.0, 0.0]]]))


@pytest.mark.parametrize("n", [2, 3])
def test_what_comes_out_of_a_walk_is_allowed_whatever_goes_in(n):
    random = torch.Generator().manual_seed(0)
    path = 3 * torch.randn(200, 12, n, generator=random)
    discs = [Disc(torch.randn(n, generator=random), 0.7) for _ in range(3)]
    boxes = [Box(torch.full((n,), 1.0), torch.full((n,), 1.8))]
    ends: dict[str, Any] = {"low": torch.full((n,), -2.5), "high": torch.full((n,), 2.5)}
    region = Region([*discs, *boxes], **ends, step=0.8)
    start = region.freed(2 * torch.randn(200, n, generator=random))
    found = region.walk(region.push(path, start), start)
    places = torch.cat([start.unsqueeze(1), found], dim=1)
    assert region.free(places).all()
    assert not region.hit(places[:, :-1], places[:, 1:]).any()
    assert (found.diff(dim=1).norm(dim=-1) <= 0.8 + 1e-5).all()
    assert (found - path.clamp(-2.5, 2.5)).norm(dim=-1).min() == 0  # and what can be reached is left alone


def test_out_of_overlapping_obstacles_there_is_a_way():
    region = Region([UNIT, Disc(torch.tensor([1.2, 0.0]), 1.0)], **WIDE)
    found = region.freed(torch.tensor([[0.6, 0.0], [5.0, 0.0]]))
    assert region.free(found).all()
    assert found[0].abs().max() < 2.5
    torch.testing.assert_close(found[1], torch.tensor([5.0, 0.0]))


def normalized_chunks(policy, rows=16):
    return torch.rand(rows, 8, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"normalizer": {"default": "gaussian"}},
        {"action_frame": {"name": "planar_object", "observation": "state", "pose": [2, 3, 4]}},
        {"action_frame": {"name": "position", "observation": "state", "columns": [0, 1], "action_columns": [0, 1]}},
    ],
    ids=["minmax", "gaussian", "planar_object", "position"],
)
def test_limits_hold_in_the_units_of_the_data(tmp_path, sections):
    """Through frames and normalisers, in what `predict` returns, to the last digit."""
    policy = tiny_policy(demonstrations(), **sections)
    bundles.save(tmp_path, policy, {"policy": TINY | {"encoder": {"name": "observation"}} | sections})
    obs = {"state": np.random.default_rng(0).normal(100, 5, (16, 2, 5)).astype(np.float32)}
    noise = np.random.default_rng(1).normal(size=(16, 8, 2)).astype(np.float32)
    plain = bundles.load(tmp_path).predict(obs, noise=noise)["action_pred"]
    middle = np.median(plain[:, 1:].reshape(-1, 2), axis=0)
    spread = plain[:, 1:].reshape(-1, 2).std(axis=0)
    low, high = middle - 3 * spread, middle + 0.2 * spread
    disc = [*middle.tolist(), float(spread.min())]
    limits = words(discs=[disc], low=low.tolist(), high=high.tolist(), speed=20 * float(spread.min()))
    write(tmp_path, "constraint", Fitted(limits))
    found = bundles.load(tmp_path, extensions=["constraint"]).predict(obs, noise=noise)
    coming = found["action_pred"][:, 1:].astype(np.float64)
    assert (np.linalg.norm(plain[:, 1:] - middle, axis=-1) < disc[2]).any()
    assert (np.linalg.norm(coming - middle, axis=-1) >= disc[2]).all()
    assert (coming >= low).all()
    assert (coming <= high).all()
    assert (np.linalg.norm(np.diff(coming, axis=1), axis=-1) <= 2 * spread.min()).all()
    assert found["constraint.moved"].shape == (16,)


def test_what_is_past_is_not_moved():
    policy = tiny_policy(demonstrations())
    chunk = normalized_chunks(policy)
    limits = words(high=policy.unnormalize_action(chunk, {}).mean((0, 1)).tolist())
    seen = policy.see({"state": torch.full((16, 2, 5), 100.0)})
    found, moved = Constraint(policy, Fitted(limits)).project(seen, chunk, last=True)
    torch.testing.assert_close(found[:, 0], chunk[:, 0], atol=0, rtol=0)
    assert (found[:, 1:] != chunk[:, 1:]).any()
    assert moved.shape == (16, 7)


def test_the_line_from_the_arm_to_the_first_action_counts():
    """Of each row its own, and with several samples of an observation."""
    policy = tiny_policy(demonstrations())
    chunk = policy.normalize_action(torch.tensor([104.0, 100.0]).expand(4, 8, 2), {})
    state = torch.full((2, 2, 5), 100.0)
    state[0, 1, 0] = 96.0  # beyond the disc; the other arm is where the chunk is
    state[1, 1, 0] = 104.0
    limits = words(discs=[[100, 100, 2]], position="state")
    found, _ = Constraint(policy, Fitted(limits)).project(policy.see({"state": state}), chunk, last=True)
    action = policy.unnormalize_action(found, {})[:, 1:]
    disc = Disc(torch.tensor([100.0, 100.0]), 2.0)
    start = state[:, 1, :2].repeat_interleave(2, dim=0).unsqueeze(1)
    assert not disc.hit(start, action[:, :1]).any()
    torch.testing.assert_close(found[2:], chunk[2:], atol=0, rtol=0)
    assert (found[:2] != chunk[:2]).any()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "nothing"),
        ({"discs": [[0, 0]]}, r"discs\[0\].*3 numbers"),
        ({"discs": [[0, 0, 1], [0, 0, -1]]}, r"discs\[1\].*radius"),
        ({"boxes": [[0, 0, 1]]}, r"boxes\[0\].*4 numbers"),
        ({"boxes": [[0, 0, -1, 1]]}, r"boxes\[0\].*low corner"),
        ({"low": [0]}, "low has 1 numbers for actions of 2"),
        ({"low": [0, 5], "high": [1, 5]}, r"low\[1\]=5 must be below high\[1\]=5"),
        ({"speed": 1.0, "columns": [0, 2]}, "from 0 to 1"),
        ({"speed": 1.0, "columns": [1, 1]}, "different"),
        ({"speed": 1.0, "columns": [0, 1], "position": "sate"}, "state"),
        ({"speed": 1.0, "position": "state", "position_columns": [0, 5]}, "from 0 to 4"),
        ({"speed": 1.0, "position": "state", "position_columns": [0, 1, 2]}, "for 2 columns"),
        ({"speed": 1.0, "lead": -1.0}, "lead"),
        ({"speed": "fast"}, "speed=fast"),
    ],
)
def test_limits_that_cannot_be_are_refused(given, match):
    """Where they are given, and where a bundle's file brings them."""
    with pytest.raises(InputError, match=match):
        Constraint(tiny_policy(demonstrations()), Fitted(words(**given)))


def test_a_file_that_lacks_a_limit_is_refused():
    limits = words(speed=1.0)
    del limits["margin"]
    with pytest.raises(InputError, match="margin is missing"):
        Constraint(tiny_policy(demonstrations()), Fitted(limits))


class Actions(BatchSource):
    """As much of it as is looked at."""

    def __init__(self) -> None: ...

    def values(self, name):
        return np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])


def test_fit_says_what_share_of_the_demonstrations_keeps_to_it():
    policy = tiny_policy(demonstrations())
    fitted = Constraint.fit(policy, Actions(), Actions(), options(discs=[[0, 0, 0.5]], high=[2.5, 9]))
    assert fitted.options["demonstrated_actions_within"] == 0.5
    with pytest.raises(InputError, match="no demonstrated action"):
        Constraint.fit(policy, Actions(), Actions(), options(discs=[[0, 0, 9]]))
