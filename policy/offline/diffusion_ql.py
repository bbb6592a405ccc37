"""Better than what was recorded, from rewards that were recorded: "Diffusion Policies as an Expressive Policy Class for
Offline Reinforcement Learning" (Diffusion-QL, Wang et al. 2023), with DOSER's regulariser.

    policy     E[w ℓ_denoising] − η · E[Q] / E|Q|,  Q = min_i Q_i(s, a),  a = the sampler's chunk, differentiated
    critics    Q_i(s, a) ← r + γⁿ · min_i Q'_i(s', a'),      a' = the average policy's chunk; s, a as recorded
               Q_i(s, a) ← the least target of the batch,    for chunks a that are unlike what was recorded

Q is known where there is data, and unbounded elsewhere: a policy that climbs it leaves the data. What is unlike the
data, a denoiser D tells that only imitates (DOSER): how far it moves a chunk in the sampler's last step,
‖D(α a + σ n; s) − a‖, beside the same of recorded chunks. Those above their `quantile`, of the policy's own chunks and
of recorded ones with noise, are worth the least. (The policy's own denoiser tells it no more: it has learnt to move
recorded chunks that are not worth much.)

A gradient moves a chunk within its mode, never to a better one that lies apart. What does is to imitate good chunks
more than others, by their advantage (AWR, Peng et al. 2019, "Advantage-Weighted Regression"; decided here: in units of
its standard deviation in the batch, so that rewards may have any scale):

    w          ∝ exp(A / (temperature · sd A)),  1 on average;   A = Q(s, a) − V(s) of recorded chunks
    V(s)       ← Q(s, a), in the mean

An episode that breaks off tells no target, since nobody saw what follows; one that ends earns nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.stored import condition_dim, executed
from action_diffusion.policy.objectives.objective import ChunkOutcome, Denoising, Learner, Network
from action_diffusion.policy.offline.critics import OfflineCritics
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Prefix, network_of
from action_diffusion.policy.value.networks import Value


@dataclass(kw_only=True, eq=False)
class DiffusionQl(Denoising):
    """eta: η, of the values beside the denoising loss. pessimism: of unlike chunks beside the recorded ones, 0: none;
    quantile: of recorded chunks, above which one is unlike; spread: most noise on recorded chunks, normalised units.
    temperature: of the weights of what is imitated; None: all chunks alike. warmup: batches that the critics learn from
    first, while the policy imitates. follow: share of the way to the
    weights that averages move by.

    reward: the buffer's column; None: `reward`, or what PushT's states say. counted: "success", "dense" or "given"
    (`batches.loader.COUNTED`). terminal: the column that is true where an episode came to its end; None: a reward of 1
    says it. gamma: discount of a control step. hidden, octaves, members: of the critics (`Value`).
    """

    eta: float = 1.0
    pessimism: float = 1.0
    quantile: float = 0.95
    spread: float = 0.5
    temperature: float | None = None
    warmup: int = 1000
    follow: float = 0.005
    reward: str | None = None
    counted: str = "success"
    terminal: str | None = None
    gamma: float = 0.99
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    octaves: int = 4
    members: int = 2

    rewarded: ClassVar[bool] = True

    def critics(self, policy: DiffusionPolicy) -> OfflineCritics:
        sizes: dict[str, Any] = {
            "condition_dim": condition_dim(policy),
            "octaves": self.octaves,
            "hidden": self.hidden,
        }
        executed_dim = policy.spec.n_action_steps * policy.spec.noise_shape[1]
        value = Value(action_dim=executed_dim, members=self.members, **sizes)
        usual = None if self.temperature is None else Value(members=1, **sizes)
        return OfflineCritics(policy, value, usual=usual, clones=self.pessimism > 0)

    def weights(self, policy: Learner, condition: Tensor, x0: Tensor) -> Tensor | None:
        """exp(A / (temperature · sd A)), brought to 1 on average; None while the critics warm up."""
        critics = policy.critics
        if self.temperature is None or not policy.training or not isinstance(critics, OfflineCritics):
            return None
        if critics.usual is None or int(critics.steps) < self.warmup:
            return None
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            condition, x0 = condition.float(), x0.float()
            advantage = critics.value(condition, executed(policy, x0)).amin(0) - critics.usual(condition)[0]
            spread = advantage.std(correction=0).clamp_min(1e-6)
            weights: Tensor = len(advantage) * (advantage / (self.temperature * spread)).softmax(dim=0)
            return weights

    def further_loss(
        self,
        policy: Learner,
        obs: Mapping[str, Tensor],
        action: Tensor,
        beside: Mapping[str, Any],
        generator: torch.Generator | None,
    ) -> Tensor | None:
        """Of critics and policy; their gradients are kept apart. None in evaluation. Raises `InputError` without
        outcomes."""
        if not policy.training:
            return None
        critics, outcome = policy.critics, beside.get("outcome")
        if not isinstance(critics, OfflineCritics) or outcome is None:
            raise InputError("policy.objective: diffusion_ql learns from rewards, and none are given")
        with torch.autocast(action.device.type, enabled=False):
            return self._loss(policy, critics, obs, action, outcome, generator)

    def _loss(
        self,
        policy: Learner,
        critics: OfflineCritics,
        obs: Mapping[str, Tensor],
        action: Tensor,
        outcome: ChunkOutcome,
        generator: torch.Generator | None,
    ) -> Tensor:
        critics.follow(policy, self.follow)
        with torch.no_grad():
            seen = policy.see(obs, generator)
            condition, x0 = seen.condition, policy.normalize_action(action, seen.obs)
            target = self.target(policy, critics, outcome, generator)
        known = ~outcome.truncated
        said = critics.value(condition, executed(policy, x0))
        loss: Tensor = ((said - target).square().mean(0) * known).sum() / known.sum().clamp_min(1)
        if critics.usual is not None:
            loss = loss + (critics.usual(condition)[0] - said.detach().amin(0)).square().mean()
        clone = None
        if critics.clone is not None:
            clone = network_of(critics.clone, condition, Prefix.none(x0) if self.max_delay else None)
            pairs = self.pairs(clone, policy.process, x0, generator)
            loss = loss + self.reduced(pairs, policy.process, None, len(x0))
        if int(critics.steps) <= self.warmup:
            return loss
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        made = policy.sample(obs, noise=noise, generator=generator, grad=True).normalized
        if clone is not None and known.any():
            least = target[known].min()
            for judged in (made.detach(), self.noised(x0, generator)):
                strange = self.unlike(clone, policy, judged, x0, generator)
                error = (critics.value(condition, executed(policy, judged)) - least).square()
                loss = loss + self.pessimism * (error * strange).mean()
        worth = critics.frozen(condition, executed(policy, made)).amin(0)
        gain: Tensor = worth.mean() / worth.detach().abs().mean().clamp_min(1e-6)
        return loss - self.eta * gain

    def target(
        self, policy: Learner, critics: OfflineCritics, outcome: ChunkOutcome, generator: torch.Generator | None
    ) -> Tensor:
        """r + γⁿ · min Q'(s', a'), [B]; r alone at the end of an episode."""
        seen = critics.actor.see(outcome.next_obs).condition
        noise = torch.randn((len(seen), *policy.spec.noise_shape), generator=generator, device=seen.device)
        chunk = critics.actor.sample(outcome.next_obs, noise=noise, generator=generator).normalized
        following = critics.target(seen, executed(policy, chunk)).amin(0)
        target: Tensor = outcome.reward + outcome.discount * ~outcome.done * following
        return target

    def unlike(
        self,
        clone: Network,
        policy: Learner,
        judged: Tensor,
        recorded: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Whether a chunk of `judged` [B, H, A] is moved further than most of the `recorded`, bool [B]."""
        step = policy.sampler.steps[-1]
        eps = torch.randn(recorded.shape, generator=generator, device=recorded.device)

        def error(x0: Tensor) -> Tensor:
            x = step.a * x0 + step.b * eps
            output = clone(x, torch.full((len(x),), step.time, device=x.device))
            far: Tensor = (policy.process.x0_from_output(output, x, step) - x0).square().flatten(1).mean(1)
            return far

        with torch.no_grad():
            return error(judged) > torch.quantile(error(recorded), self.quantile)

    def noised(self, x0: Tensor, generator: torch.Generator | None) -> Tensor:
        """Recorded chunks with as much noise as comes, up to `spread`."""
        much = self.spread * torch.rand((len(x0), 1, 1), generator=generator, device=x0.device)
        return x0 + much * torch.randn(x0.shape, generator=generator, device=x0.device)
