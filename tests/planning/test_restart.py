"""Sampling that begins at chunks that are known."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import gaussian

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Diffusion, Flow
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.planning.restart import Restart, step_at


def randn(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm_solver++", "ddpm", "flow"])
def test_the_network_first_sees_the_chunks_at_the_noise_that_was_asked_for(scheduler):
    process = Flow(prediction="sample") if scheduler == "flow" else Diffusion(prediction="sample")
    sampler = Sampler(process=process, scheduler=scheduler, num_inference_steps=20, clip=None)
    seen = []

    def denoise(x, step, rows=None):
        seen.append((step, x))
        return torch.zeros_like(x)

    x0, z = randn(0), randn(1)
    sampler.run(denoise, z, hooks=[Restart(x0, 0.5)], generator=torch.Generator().manual_seed(0))
    first, x = seen[0]
    assert first == next(step for step in sampler.steps if step.b <= 0.5)
    torch.testing.assert_close(x, first.a * x0 + first.b * z)
    assert [step.index for step, _ in seen] == list(range(first.index, 20))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm_solver++"])
def test_a_gaussian_is_kept(scheduler):
    """Along the probability flow of N(0, s²) a sample stays at its quantile: x_k → x_k · s / √(a² s² + b²)."""
    s, steps = 0.3, 100 if scheduler == "ddim" else 50
    sampler = Sampler(process=Diffusion(prediction="sample"), scheduler=scheduler, num_inference_steps=steps, clip=None)
    x0, z = s * randn(0), randn(1)
    found, _ = sampler.run(gaussian(s), z, hooks=[Restart(x0, 0.7)])
    level = step_at(sampler.steps, 0.7)
    noisy = level.a * x0 + level.b * z
    expected = noisy * s / math.sqrt(level.a**2 * s**2 + level.b**2)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=5e-3)


def test_what_cannot_be_is_refused():
    sampler = Sampler(process=Diffusion(prediction="sample"), scheduler="ddim", num_inference_steps=5)
    with pytest.raises(InputError, match=r"noise=0\.001.*the later steps"):
        sampler.run(gaussian(1.0), randn(0), hooks=[Restart(randn(1), 0.001)])
    with pytest.raises(InputError, match=r"\[2, 4, 2\] to begin at.*\[3, 4, 2\]"):
        sampler.run(gaussian(1.0), randn(0), hooks=[Restart(randn(1)[:2], 0.5)])
