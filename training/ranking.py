"""Which episodes of a buffer are the least like the others, by a policy's guard."""

from __future__ import annotations

from pathlib import Path

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.guard import Guard, Unusual
from action_diffusion.training.data import prepare


def unusual(buffer: ReplayBuffer, bundle: Path) -> list[Unusual]:
    """All episodes, the most unusual first. Raises `InputError` for a bundle without a guard, and for a buffer that its
    policy does not take."""
    policy = bundles.load(bundle, "auto", extensions=["guard"])
    guard = policy.extensions[0]
    assert isinstance(guard, Guard)
    return guard.ranked(prepare(buffer, policy.spec, device=policy.device, val_fraction=0.0, seed=0).train)
