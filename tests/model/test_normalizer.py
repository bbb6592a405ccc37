"""Normalisation and the fixed features before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from action_diffusion.errors import InputError
from action_diffusion.policy.model.features import Magnified, PlanarObject, SinCos
from action_diffusion.policy.model.normalizer import Normalizer, fit

VALUES = arrays(
    np.float32,
    st.tuples(st.integers(1, 20), st.integers(1, 4)),
    elements=st.floats(-1000, 1000, width=32).map(lambda v: np.float32(round(v, 2))),
)


@settings(deadline=None, max_examples=60)
@given(values=VALUES, kind=st.sampled_from(["minmax", "gaussian", "identity"]))
def test_there_and_back(values, kind):
    normalizer = Normalizer({"x": fit(values, kind)})
    tensor = torch.from_numpy(values)
    normal = normalizer.normalize("x", tensor)
    assert normal.isfinite().all()
    torch.testing.assert_close(normalizer.unnormalize("x", normal), tensor, atol=2e-2, rtol=1e-4)
    if kind == "minmax":
        assert normal.abs().max() <= 1.001


def test_a_constant_dimension_maps_to_zero_and_back():
    values = np.array([[1.0, 5.0], [3.0, 5.0]], dtype=np.float32)
    for kind in ("minmax", "gaussian"):
        normalizer = Normalizer({"x": fit(values, kind)})
        normal = normalizer.normalize("x", torch.from_numpy(values))
        assert (normal[:, 1] == 0).all()
        assert (normalizer.unnormalize("x", normal)[:, 1] == 5.0).all()
        # whatever a network says about it
        assert (normalizer.unnormalize("x", torch.full((2, 2), 0.7))[:, 1] == 5.0).all()


def test_statistics_survive_json():
    import json

    statistics = fit(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    assert json.loads(json.dumps(statistics)) == statistics
    assert set(statistics) == {"kind", "scale", "offset", "min", "max"}


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"x": {"scale": [1.0]}}, "lack 'offset'"),
        ({"x": {"scale": [0.0], "offset": [0.0]}}, "finite and not zero"),
        ({"x": {"scale": [float("nan")], "offset": [0.0]}}, "finite and not zero"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(statistics, message):
    with pytest.raises(InputError, match=message):
        Normalizer(statistics)


def test_unknown_kinds_and_keys_are_named():
    with pytest.raises(InputError, match="did you mean minmax"):
        fit(np.zeros((2, 2)), "minimax")
    with pytest.raises(InputError, match="did you mean state"):
        Normalizer({"state": fit(np.eye(2))}).normalize("states", torch.zeros(2))
    with pytest.raises(InputError, match="no steps"):
        fit(np.zeros((0, 2)))


def test_sin_cos_is_continuous_where_an_angle_wraps():
    feature = SinCos(n=3, columns=[2])
    below, above = torch.tensor([1.0, 2.0, 2 * np.pi - 1e-4]), torch.tensor([1.0, 2.0, 1e-4])
    assert feature.output_dim == 4
    torch.testing.assert_close(feature(below), feature(above), atol=1e-3, rtol=0)
    torch.testing.assert_close(feature(below)[:2], below[:2])


def test_planar_object_writes_corners_and_relative_positions():
    feature = PlanarObject(n=5, pose=[2, 3, 4], points=[[10.0, 0.0], [0.0, 5.0]], relative=[0, 1])
    state = torch.tensor([[1.0, 2.0, 100.0, 50.0, np.pi / 2]])
    out = feature(state)[0]
    assert out.shape == (feature.output_dim,)
    # a quarter turn takes (10, 0) to (0, 10) and (0, 5) to (-5, 0)
    torch.testing.assert_close(out[6:10], torch.tensor([100.0, 60.0, 95.0, 50.0]), atol=1e-3, rtol=0)
    # the agent, seen from the object: rotate its offset back
    torch.testing.assert_close(out[10:], torch.tensor([-48.0, 99.0]), atol=1e-3, rtol=0)


def test_features_refuse_columns_that_do_not_exist():
    with pytest.raises(InputError, match="column 7 does not exist in an observation of 5"):
        SinCos(n=5, columns=[7])
    with pytest.raises(InputError, match="pose takes three columns"):
        PlanarObject(n=5, pose=[2, 3], points=[[0, 0]])


@settings(deadline=None, max_examples=40)
@given(values=VALUES, scale=st.floats(0.01, 100))
def test_magnified_columns_are_added(values, scale):
    columns = list(range(values.shape[1]))[::2]
    feature = Magnified(n=values.shape[1], columns=columns, scale=scale)
    found = feature(torch.from_numpy(values)).numpy()
    assert found.shape == (len(values), feature.output_dim)
    np.testing.assert_array_equal(found[:, : values.shape[1]], values)
    expected = np.arcsinh(values[:, columns].astype(np.float64) / scale)
    np.testing.assert_allclose(found[:, values.shape[1] :], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "message"), [({"columns": [3]}, "column 3"), ({"scale": 0}, "above 0")])
def test_magnified_refuses(options, message):
    with pytest.raises(InputError, match=message):
        Magnified(**{"n": 3, "columns": [0], "scale": 1.0} | options)


@pytest.mark.parametrize("kind", ["minmax", "gaussian", "identity"])
def test_what_is_clipped_to_covers_what_was_demonstrated(make_policy, kind):
    """In the data's units, whatever the normaliser; a network that says far too much reaches it, and not more."""
    policy = make_policy(normalizer={"default": kind})
    statistics = policy.spec.normalizer["action"]
    for extreme, end in ((-1e4, "min"), (1e4, "max")):
        x0 = policy.sampler._clip(torch.full((2, 8, 2), extreme), "x0")
        reached = policy.normalizer.unnormalize("action", x0)
        expected = torch.tensor(statistics[end]).expand_as(reached)
        torch.testing.assert_close(reached, expected, rtol=1e-5, atol=1e-4)


def test_min_max_is_clipped_as_ever(make_policy):
    policy = make_policy()
    assert policy.sampler.bounds is None
    x0 = torch.linspace(-3, 3, 32).view(1, 16, 2)
    assert torch.equal(policy.sampler._clip(x0, "x0"), x0.clamp(-1.0, 1.0))


def test_a_wider_range_is_wider_on_both_sides(make_policy):
    plain = make_policy(normalizer={"default": "gaussian"}).sampler
    sampler = {"scheduler": "ddim", "num_inference_steps": 5, "clip_range": 2.0}
    wide = make_policy(normalizer={"default": "gaussian"}, sampler=sampler).sampler
    (low, high), (lower, higher) = plain.bounds, wide.bounds
    torch.testing.assert_close(higher - lower, 2 * (high - low))
    torch.testing.assert_close(higher + lower, high + low)
