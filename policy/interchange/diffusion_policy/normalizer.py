"""diffusion_policy's LinearNormalizer among the weights: normalised = x · scale + offset, as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.spec import CONSTANT

NORMALIZER = "normalizer.params_dict."
"""What names of its numbers begin with."""


def numbers(state: Mapping[str, Tensor], key: str, name: str, size: int) -> np.ndarray:
    """One for each dimension of an observation or of the action, float64 [size]; theirs may have one for all."""
    found = state.get(f"{NORMALIZER}{key}.{name}")
    if found is None or found.numel() not in (1, size):
        there = "missing" if found is None else f"{found.numel()} numbers"
        raise InputError(f"{NORMALIZER}{key}.{name} is {there}, expected {size}")
    return np.broadcast_to(found.flatten().double().numpy(), size)


def statistics(state: Mapping[str, Tensor], key: str, size: int) -> dict[str, Any]:
    """As `policy.model.normalizer.fit` has them.

    A dimension of the action that never changed is what the network says there, and its constant here: its range is
    said to be what is normalised to [−1, 1], so that it is not taken for a constant.
    """
    names = ("scale", "offset", "input_stats.min", "input_stats.max")
    scale, offset, low, high = (numbers(state, key, name, size) for name in names)
    if (scale == 0).any():
        raise InputError(f"{NORMALIZER}{key}.scale has a 0")
    ends = np.sort([(-1 - offset) / scale, (1 - offset) / scale], axis=0)
    if key == "action":
        still = high - low <= 2 * CONSTANT * np.maximum(1.0, np.abs(high))
        low, high = np.where(still, ends[0], low), np.where(still, ends[1], high)
    kind = "minmax" if np.allclose(ends, [low, high], rtol=1e-4, atol=1e-4) else "gaussian"
    if (scale == 1).all() and (offset == 0).all():
        kind = "identity"
    named = {"scale": scale, "offset": offset, "min": low, "max": high}
    return {"kind": kind} | {name: np.float32(value).tolist() for name, value in named.items()}
