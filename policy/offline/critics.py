"""The critics of a policy that learns from recorded rewards, beside the policy while it is trained: no bundle has them.

value     Q(s, a) [n, B], an ensemble on the policy's condition and the executed part of a chunk
target    its average, and
actor     the policy's average: what will be done next, and what that is worth
usual     V(s) [1, B], what recorded chunks are worth there on average
clone     a denoiser that only imitates, and so knows what was recorded
steps     so many batches were learnt from
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from action_diffusion.policy.objectives.objective import Learner
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.averages import averaged_copy, follow
from action_diffusion.policy.value.networks import Value


class OfflineCritics(nn.Module):
    """policy: whose average the actor is. value: what judges, [n, B]. usual: V, where advantages are asked for. clones:
    whether there is a clone."""

    steps: Tensor

    def __init__(
        self,
        policy: DiffusionPolicy,
        value: Value,
        *,
        usual: Value | None = None,
        clones: bool,
    ) -> None:
        super().__init__()
        self.value, self.usual = value, usual
        self.target, self.actor = averaged_copy(value), averaged_copy(policy)
        self.clone = copy.deepcopy(policy.denoiser) if clones else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> OfflineCritics:
        """The averages stay in evaluation mode: they say what is, and learn nothing."""
        super().train(mode)
        for average in (self.target, self.actor):
            average.eval()
        return self

    def follow(self, policy: Learner, share: float) -> None:
        """Move the averages towards what they are of: once a batch."""
        follow(self.target, self.value, share)
        own = dict(self.actor.named_parameters())
        for name, parameter in policy.named_parameters():
            if name in own:
                own[name].lerp_(parameter.detach(), share)
        self.steps += 1

    def frozen(self, condition: Tensor, action: Tensor) -> Tensor:
        """Q [n, B] with a gradient for what is done, and none for the critics' weights."""
        weights = {name: parameter.detach() for name, parameter in self.value.named_parameters()}
        result: Tensor = torch.func.functional_call(self.value, weights, (condition, action))
        return result
