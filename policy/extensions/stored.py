"""Networks and numbers of a fitted extension, checked on their way in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.objectives.objective import Learner
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.schema import shown


def condition_dim(policy: DiffusionPolicy) -> int:
    """How many values an encoded history has, C."""
    obs = {
        key: torch.zeros(
            (1, policy.spec.n_obs_steps, *spec.shape),
            dtype=torch.uint8 if spec.kind == "image" else torch.float32,
            device=policy.device,
        )
        for key, spec in policy.spec.observations.items()
    }
    with torch.no_grad():
        return policy.see(obs).condition.shape[1]


def executed(policy: Learner, normalized: Tensor) -> Tensor:
    """What is executed of chunks [B, H, A], as a critic takes it: [B, Ta · A]."""
    now = policy.spec.n_obs_steps - 1
    return normalized[:, now : now + policy.spec.n_action_steps].flatten(1)


def arrays(**modules: nn.Module) -> dict[str, np.ndarray]:
    """Weights as a fitted extension stores them, "critic.net.weights.0" → float32."""
    return {
        f"{name}.{key}": value.detach().float().cpu().numpy()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def restore(name: str, fitted: Fitted, part: str, module: nn.Module, device: torch.device) -> None:
    """Put the weights of `part` into a module on "meta", which goes to `device`. `InputError` where they do not fit."""
    found: Mapping[str, np.ndarray] = {
        key.removeprefix(f"{part}."): value for key, value in fitted.arrays.items() if key.startswith(f"{part}.")
    }
    for key, value in module.state_dict().items():
        if key not in found or found[key].shape != tuple(value.shape) or found[key].dtype != np.float32:
            there = list(found[key].shape) if key in found else "missing"
            raise InputError(
                f"extension {name} does not belong to this policy: {part}.{key} is {there}, expected float32 "
                f"{list(value.shape)}"
            )
    module.load_state_dict({key: torch.from_numpy(found[key]) for key in module.state_dict()}, assign=True)
    module.to(device).eval().requires_grad_(False)


def hidden_sizes(name: str, fitted: Fitted) -> list[int]:
    """The option `hidden`. Raises `InputError` for other than one to eight sizes from 1 to 8192."""
    sizes = fitted.options.get("hidden")
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= 8 or not all(_is_whole(size, 1, 8192) for size in sizes):
        raise InputError(f"extension {name}: hidden={shown(sizes)}, expected one to eight sizes of layers")
    return sizes


def whole(name: str, fitted: Fitted, option: str, least: int, most: int) -> int:
    """A whole number among the options. Raises `InputError`."""
    value = fitted.options.get(option)
    if not _is_whole(value, least, most):
        raise InputError(f"extension {name}: {option}={shown(value)}, expected a whole number from {least} to {most}")
    assert isinstance(value, int)
    return value


def number(name: str, fitted: Fitted, option: str, least: float, most: float) -> float:
    """A number among the options. Raises `InputError`."""
    value = fitted.options.get(option)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InputError(f"extension {name}: {option}={shown(value)}, expected {least:g} to {most:g}")
    assert math.isfinite(value)
    return float(value)


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
