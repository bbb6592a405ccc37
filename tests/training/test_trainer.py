"""The loop's arithmetic, on a model whose loss has no noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from action_diffusion.datasets.batches.loader import Batch
from action_diffusion.options import TrainSettings
from action_diffusion.training.trainer import Average, Trainer, make_optimizer


class Regression(torch.nn.Module):
    """loss = mean (W obs - action)^2"""

    critics = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2)

    def acting(self):
        return dict(self.named_parameters())

    def forward(self, obs, action, mask, *, generator):
        return (self.linear(obs["x"]) - action).square().mean()


class Consecutive:
    """Batch after batch of one list of samples."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(160, 3, generator=generator), torch.randn(160, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, step, batch_size, generator):
        rows = slice(step * batch_size, (step + 1) * batch_size)
        return Batch({"x": self.x[rows]}, self.y[rows], torch.ones(batch_size, 1, dtype=torch.bool))


def trained(folder: Path, policy: Any = None, **changes: Any) -> tuple[Trainer, torch.Tensor]:
    settings = TrainSettings(
        max_steps=10, warmup=0, validate_every=0, rollout_every=0, checkpoint_every=0, **{"lr": 0.05, **changes}
    )
    trainer = Trainer(
        policy=policy if policy is not None else cast(Any, Regression()),
        source=Consecutive(),
        settings=settings,
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=settings.gradient_accumulation_steps),
        output_dir=folder,
        seed=0,
        metrics=None,
        write_bundle=lambda path, weights: path.mkdir(parents=True),
        show_progress=False,
    )
    losses: list[torch.Tensor] = []
    step = trainer._step
    trainer._step = lambda: losses.append(step()) or losses[-1]
    trainer.run()
    return trainer, torch.stack(losses)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_accumulated_gradients_equal_a_larger_batch(tmp_path, max_grad_norm):
    parts, losses = trained(tmp_path / "a", batch_size=4, gradient_accumulation_steps=4, max_grad_norm=max_grad_norm)
    whole, expected = trained(tmp_path / "b", batch_size=16, max_grad_norm=max_grad_norm)
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts.policy.state_dict(), whole.policy.state_dict(), atol=1e-6, rtol=1e-5)
    assert parts.steps_per_epoch == whole.steps_per_epoch == 10
    weights = whole.policy.get_parameter("linear.weight")
    assert not torch.equal(weights, Regression().linear.weight)


def test_the_average_is_that_of_diffusers():
    network, random = torch.nn.Linear(30, 20), torch.Generator().manual_seed(0)
    network.bias.requires_grad_(False)
    options: dict[str, Any] = {"decay": 0.9999, "use_ema_warmup": True, "power": 0.75}
    ours, theirs = Average(network.parameters(), **options), EMAModel(network.parameters(), **options)
    for _ in range(5):
        network.weight.data += torch.randn(network.weight.shape, generator=random)
        for average in (ours, theirs):
            average.step(network.parameters())
    assert ours.optimization_step == theirs.optimization_step
    for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


class Dropped(Regression):
    def forward(self, obs, action, mask, *, generator):
        return (torch.nn.functional.dropout(self.linear(obs["x"])) - action).square().mean()


def test_dropout_follows_from_the_step_and_not_from_what_drew_before(tmp_path):
    losses = []
    for seed in range(2):
        policy = Dropped()
        torch.manual_seed(seed)
        losses.append(trained(tmp_path / str(seed), policy, batch_size=16, lr=1e-30)[1])
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], trained(tmp_path / "plain", batch_size=16, lr=1e-30)[1])


def test_matrices_are_decayed_and_positions_biases_and_norms_are_not(make_policy):
    policy = make_policy(denoiser={"name": "transformer", "width": 16, "layers": 1, "heads": 2})
    decayed, others = make_optimizer(policy, TrainSettings(max_steps=1)).param_groups
    assert decayed["weight_decay"] > others["weight_decay"] == 0
    weights = dict(policy.named_parameters())
    kept = {name for name in weights if name.endswith("bias") or "norm" in name or "pos_emb" in name or "ln_f" in name}
    for group, names in ((decayed, weights.keys() - kept), (others, kept)):
        assert {id(weight) for weight in group["params"]} == {id(weights[name]) for name in names}
