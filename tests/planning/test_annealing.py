"""Refinement by a smoothed cost: its gradient where that is known, and the lowest of many valleys."""

from __future__ import annotations

import math

import pytest
import torch

from action_diffusion.errors import InputError
from action_diffusion.policy.planning.annealing import anneal, smoothed_gradient


def test_the_smoothed_gradient_of_a_wave_is_its_own_less_what_is_averaged_away():
    """J = cos kx: ∇J_σ = −k exp(−k² σ² / 2) sin kx."""
    x, k, sigma = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1), 3.0, 0.4
    generator = torch.Generator().manual_seed(0)
    found = smoothed_gradient(lambda chunk: (k * chunk).cos().sum(dim=(1, 2)), x, sigma, 50_000, generator)
    expected = -k * math.exp(-((k * sigma) ** 2) / 2) * (k * x).sin()
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_the_lowest_of_many_valleys_is_found():
    centre = torch.tensor([[0.2, -0.3]])

    def cost(chunk):
        off = chunk - centre
        return (off.square() + 0.05 * (1 - (10 * math.pi * off).cos())).sum(dim=(1, 2))

    begin = torch.tensor([[[0.9, 0.8]], [[-0.9, 0.5]], [[0.6, -0.9]]])
    found = anneal(cost, begin, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, centre.expand(3, 1, 2), atol=0.05, rtol=0)


def test_a_chunk_never_costs_more_than_before():
    begin = torch.tensor([[[0.0]], [[1.0]]])
    found = anneal(lambda chunk: (chunk == begin).logical_not().float().sum(dim=(1, 2)) if chunk.shape == begin.shape
                   else torch.ones(len(chunk)), begin, rounds=3)  # fmt: skip
    assert torch.equal(found, begin)


def test_impossible_costs_and_schedules_are_refused():
    chunk = torch.zeros(2, 1, 1)
    for options in ({"widest": 0.0}, {"narrowest": 1.0}, {"rounds": 0}, {"pairs": 0}, {"step": 0.0}):
        with pytest.raises(InputError, match="0 < narrowest <= widest"):
            anneal(lambda x: x.sum(dim=(1, 2)), chunk, **options)
    for bad in (lambda x: x.sum(), lambda x: x.sum(dim=(1, 2)) / 0):
        with pytest.raises(InputError, match="a finite number each"):
            anneal(bad, chunk)
