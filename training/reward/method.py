"""What every way to learn from reward is: it acts, it learns from what came of it, and says what the bundle gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.transitions import Rows, Transitions


class Method:
    """Base of all methods. `policy` is frozen unless the method says otherwise, on its device, in evaluation mode.

    modules, optimizers: what a checkpoint holds beside the rows that were collected, by name.
    """

    deterministic: ClassVar[bool] = False
    """Whether it needs a sampler that draws no noise in its steps."""
    trains_policy: ClassVar[bool] = False
    """Whether the policy's own weights change, which the bundle then has."""

    def __init__(self, policy: DiffusionPolicy, *, seed: int, capacity: int) -> None:
        self.policy, self.spec, self.device = policy, policy.spec, policy.device
        self.random = torch.Generator().manual_seed(seed)
        """Of all that is drawn here; on the CPU, so that it is the same on every device."""
        self.rows = Transitions(capacity, self.device)
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        """Chunks to try for histories, key → [B, To, …], and what is to be remembered of them."""
        raise NotImplementedError

    def learn(self, rows: Rows) -> dict[str, float]:
        """From the rows of a turn, and those before; numbers for the curves, by name (none: nothing was learnt)."""
        raise NotImplementedError

    def fitted(self) -> dict[str, Fitted]:
        """Extensions that the bundle gets, and that act in it, by name."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Weights of `modules`, flat, for a checkpoint."""
        return {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises `RuntimeError` or `KeyError` for another one."""
        for name, module in self.modules.items():
            module.load_state_dict({key: state[f"{name}.{key}"] for key in module.state_dict()})

    def tensors(self, obs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Histories on the policy's device."""
        return {key: torch.from_numpy(np.ascontiguousarray(obs[key])).to(self.device) for key in self.spec.observations}

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.random).to(self.device)


def require_steerable(policy: DiffusionPolicy, method: str) -> None:
    """`InputError` for a policy whose initial noise does not say which chunk comes of it."""
    if not policy.sampler.deterministic:
        raise InputError(
            f"method={method} steers by the noise that chunks begin with, and this policy's sampler draws more in its "
            "steps: give sampler.scheduler=ddim (eta=0), dpm_solver++ or flow"
        )
    if policy.sampler.solver.start == 0.0:
        raise InputError(
            f"method={method} steers by the noise that chunks begin with, and scheduler={policy.sampler.scheduler} "
            "begins with none: take method=idql"
        )
