"""A choice and a precise motion: tokens choose, the denoiser does, and neither does both.

A chunk goes round an obstacle, left or right, half of the demonstrations each way, and traces a curve that the
observation asks for. It is right where it goes round on one side, and leaves that side's curve by at most 5 % of its
width. In two denoising steps the denoiser often goes between; tokens are rounded.
"""

from __future__ import annotations

import numpy as np
import torch

from action_diffusion.options.extensions import TokensOptions
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.extensions.tokens import Tokens
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.rows.policies import source, trained
from benchmarks.rows.system import Measured, System

HORIZON, STEPS = 16, 2
PRECISE = 0.05
"""Root mean square distance from the curve, of which 1 is half the width."""


def curves(asked: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The chunks [N, H, 2] of asked [N, 2] (where to bend, how much) and side [N] (−1 left, 1 right)."""
    t = np.linspace(0, 1, HORIZON)
    round_it = side[:, None] * np.sin(np.pi * t)
    along = t + 0.2 * asked[:, 1:] * np.sin(3 * np.pi * (t + 0.3 * asked[:, :1]))
    return np.stack([round_it, along], axis=-1).astype(np.float32)


def judge(chunk: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """Shares of chunks [N, H, 2] that choose a side, that trace their curve as precisely as asked, that do both."""
    bump = np.sin(np.pi * np.linspace(0, 1, HORIZON))
    way = (chunk[..., 0] @ bump) / (bump @ bump)
    chosen = np.abs(np.abs(way) - 1) <= 0.2
    away = chunk - curves(asked, np.where(way < 0, -1.0, 1.0))
    bend = away - way_of(away, bump)
    precise = np.sqrt((bend**2).mean(axis=(1, 2))) <= PRECISE
    both = np.sqrt((away**2).mean(axis=(1, 2))) <= PRECISE
    return {"choice": float(chosen.mean()), "precision": float(precise.mean()), "both": float(both.mean())}


def way_of(chunk: np.ndarray, bump: np.ndarray) -> np.ndarray:
    """The part of chunks [N, H, 2] that says how far round they go, which is the choice's and not the motion's."""
    way = (chunk[..., 0] @ bump) / (bump @ bump)
    return np.stack([way[:, None] * bump, np.zeros_like(way)[:, None] * bump], axis=-1)


def measure(seed: int) -> Measured:
    random = np.random.default_rng(seed)
    asked = random.uniform(-1, 1, (8000, 2)).astype(np.float32)
    obs, action = {"asked": asked[:, None]}, curves(asked, random.choice([-1.0, 1.0], len(asked)))
    policy = trained(obs, action, steps=3000, n_action_steps=HORIZON, seed=seed, batch_size=128, lr=2e-3)
    policy.sampler = _sampler(policy, STEPS)
    options = vars(TokensOptions(bundle="", seed=seed, levels=8))
    cut = len(asked) * 9 // 10
    parts = [source({"asked": obs["asked"][part]}, action[part]) for part in (slice(cut), slice(cut, None))]
    head = Tokens(policy, Tokens.fit(policy, parts[0], parts[1], options))

    new = random.uniform(-1, 1, (500, 2)).astype(np.float32)

    def found() -> dict[str, float]:
        generators = [torch.Generator().manual_seed(row) for row in range(len(new))]
        made = policy.predict({"asked": new[:, None]}, noise_generator=generators, generator=generators)
        return judge(made["action_pred"], new)

    denoiser = found()
    policy.sampler = _sampler(policy, 20)
    many = found()
    policy.sampler = _sampler(policy, STEPS)
    policy.extensions = [head]
    both = found()
    said, _ = head.head.most_likely(policy.encode({"asked": torch.from_numpy(new[:, None])}))
    alone = policy.unnormalize_action(head.tokens.decode(said), {}).numpy()
    tokens = judge(alone, new)
    fails = both["choice"] - denoiser["choice"] >= 0.15 and both["precision"] - tokens["precision"] >= 0.15
    keeps = both["choice"] >= tokens["choice"] - 0.05 and both["precision"] >= denoiser["precision"] - 0.05
    passed = fails and keeps and both["both"] >= 0.15 + max(denoiser["both"], tokens["both"])
    return Measured(
        {f"fused {name}": value for name, value in both.items()},
        {
            f"{what} {name}": value
            for what, one in (("denoiser", denoiser), ("tokens", tokens))
            for name, value in one.items()
        }
        | {"denoiser in 20 steps both": many["both"]},
        passed,
    )


def _sampler(policy: DiffusionPolicy, steps: int) -> Sampler:
    return Sampler(process=policy.process, scheduler="ddim", num_inference_steps=steps)


SYSTEM = System(
    name="two_heads",
    what="tokens choose the way and the denoiser does it, in two steps (HybridVLA)",
    bar="each head alone is 0.15 below the fused chunks in one part, and fused ones lose at most 0.05 of the other",
    measure=measure,
)
