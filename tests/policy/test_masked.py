"""Masked diffusion: what is taken away and what comes back, against probabilities that are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import demonstrations, tiny_policy
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.masked import Masked
from action_diffusion.policy.diffusion.sampler import Hook, Sampler


def sampler(steps: int) -> Sampler:
    return Sampler(process=Masked(), scheduler="masked", num_inference_steps=steps)


def test_values_go_with_the_probability_of_the_time() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.where(torch.rand(2, 5000, 1, generator=generator) < 0.5, -1.0, 1.0)
    x = Masked().add_noise(x0, torch.randn(x0.shape, generator=generator), torch.tensor([100.0, 30.0]))
    assert (x[0] == 0).all()
    assert (x[1] == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert (x[1] == x0[1])[x[1] != 0].all()


@pytest.mark.parametrize("steps", [1, 4])
def test_values_come_with_the_probability_that_the_network_says(steps) -> None:
    said = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).view(1, 1, 5).expand(4000, 1, 5)
    chunk, _ = sampler(steps).run(
        lambda x, step, rows: said, torch.zeros(4000, 1, 5), generator=torch.Generator().manual_seed(0)
    )
    assert (chunk.abs() == 1).all()
    torch.testing.assert_close(chunk.mean(dim=(0, 1)), said[0, 0], atol=0.05, rtol=0)


def test_what_appeared_stays_and_the_network_sees_it() -> None:
    """Two values that are always the same: the second is drawn once the first is known."""
    seen: list[Tensor] = []

    class Watch(Hook):
        def after_step(self, state, x_next):
            seen.append(x_next)
            return x_next

    def twins(x: Tensor, step: object, rows: Tensor | None) -> Tensor:
        return x.flip(dims=(2,))

    steps = 64
    chunk, _ = sampler(steps).run(
        twins, torch.zeros(1000, 1, 2), generator=torch.Generator().manual_seed(0), hooks=[Watch()]
    )
    together = (seen[0] == 0).all(dim=2).float().mean()
    assert together == pytest.approx((1 - 1 / steps) ** 2, abs=0.02)
    for before, after in itertools.pairwise(seen):
        assert (after[before != 0] == before[before != 0]).all()
    assert (chunk[..., 0] == chunk[..., 1]).float().mean() > 0.95
    assert chunk.mean() == pytest.approx(0.0, abs=0.1)


def test_rows_do_not_know_each_other() -> None:
    parts = {"process": {"name": "masked"}, "sampler": {"scheduler": "masked", "num_inference_steps": 5}}
    policy = tiny_policy(demonstrations(), **parts)
    obs = {"state": torch.randn(3, 2, 5) + 100}

    def sampled(rows: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        with torch.no_grad():
            return policy.sample(
                {"state": obs["state"][rows]}, noise_generator=generators, generator=generators
            ).normalized

    assert torch.equal(sampled([0, 1, 2])[1:], sampled([1, 2]))
    assert set(sampled([0, 1, 2]).unique().tolist()) <= {-1.0, 1.0}


def test_its_steps_are_no_chain_of_normal_ones() -> None:
    with pytest.raises(InputError, match="scheduler=masked"):
        sampler(2).run(lambda x, step, rows: x, torch.zeros(1, 1, 1), return_chain=True)


def test_another_scheduler_or_prediction_is_refused() -> None:
    with pytest.raises(InputError, match="masked"):
        Sampler(process=Masked(), scheduler="ddim", num_inference_steps=5)
    with pytest.raises(InputError, match="prediction"):
        Masked(prediction="epsilon")
