"""An objective: pairs of what the denoiser says and what it should say, and how far they are from each other.

    x0 [B, H, A] ─▶ pairs(network, process, x0) ─▶ (output, target) [R, H, A] of some examples ─▶ loss, a scalar

It draws noise and times and calls the network as often as it likes; what is padded or fixed before it is left out of
the loss by the policy's `counts`, whatever the objective. One that needs the denoiser to be told where a step goes, as
well as where it begins, has `two_times`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError, unknown
from action_diffusion.options import check_process
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.model.shares import drawn
from action_diffusion.policy.spec import PolicySpec

LOSSES = {
    "mse": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
    "huber": nn.functional.smooth_l1_loss,
}


class Network(Protocol):
    """The denoiser, with the condition of each example."""

    def __call__(self, x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [R, H, A], times [R], or [R, 2] for `two_times` → [R, H, A]. rows [R]: examples that x is of; None: all."""


class ChunkOutcome(Protocol):
    """What came of the executed steps of a batch of B chunks, see `batches.loader.Critic`."""

    reward: Tensor
    next_obs: dict[str, Tensor]
    done: Tensor
    truncated: Tensor
    discount: Tensor


class Learner(Protocol):
    """The policy that learns, for an objective that looks at more than the pairs of the batch."""

    training: bool
    critics: nn.Module | None
    spec: PolicySpec
    process: Process
    sampler: Sampler

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def see(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Any: ...

    def normalize_action(self, action: Tensor, obs: Mapping[str, Tensor]) -> Tensor: ...

    def sample(self, obs: Mapping[str, Tensor], *, noise: Tensor, generator: Any, grad: bool) -> Any: ...

    def shown(
        self, obs: Mapping[str, Tensor], action: Tensor, generator: torch.Generator | None
    ) -> tuple[Network, Tensor]:
        """For obs, key → [B, To, …], and chunks [B, H, A], in the data's units: the denoiser with the condition of
        these observations, and the clean chunks x0 [B, H, A] as it works on them."""
        ...


class Teacher(NamedTuple):
    """Another policy's denoiser, with its condition of each example, and the sampler that it makes chunks with."""

    network: Network
    sampler: Sampler


class Pair(NamedTuple):
    """output, target: [R, H, A], of the examples `rows` [R] (None: all). weight: [R] or None."""

    output: Tensor
    target: Tensor
    rows: Tensor | None = None
    weight: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class Objective:
    """loss: "mse", "l1" or "huber" between output and target; None: "l1" where the process predicts the sample, "mse"
    elsewhere. "mse" teaches the mean of all that a noisy chunk may come from, "l1" the median ("L1 Sample Flow for
    Efficient Visuomotor Learning", Song et al. 2025).

    noise_draws: denoising examples per encoded observation, which is cheap where the encoder is the expensive part.
    loss_on_padding: whether padded steps at the ends of an episode count (they repeat the first or last action).
    max_delay: learn to go on from up to so many steps, from now on, that are fixed already, because a running chunk has
    them ("Training-Time Action Conditioning for Efficient Real-Time Chunking", Black et al. 2025); 0: from none.

    Raises `InputError` for values that cannot be.
    """

    loss: str | None = "mse"
    noise_draws: int = 1
    loss_on_padding: bool = True
    max_delay: int = 0

    two_times: ClassVar[bool] = False
    """Whether the network is told two times: where a step begins, and where it goes."""
    taught: ClassVar[bool] = False
    """Whether it learns from another policy: `pairs` then takes a `teacher`, and training reads the bundle."""
    rewarded: ClassVar[bool] = False
    """Whether it learns from rewards: `further_loss` then takes a `ChunkOutcome`, and training gives it `critics`."""
    family: ClassVar[str | None] = None
    """Of the processes that it is for (`Process.family`); None: any."""

    def __post_init__(self) -> None:
        if self.loss is not None and self.loss not in LOSSES:
            raise unknown("policy.objective.loss", self.loss, LOSSES)
        if self.noise_draws < 1:
            raise InputError(f"policy.objective.noise_draws={self.noise_draws} must be at least 1")

    def check(self, process: Process) -> None:
        """Raises `InputError` for a process that it is not for."""
        if self.family is not None:
            check_process(type(self).__name__, self.family, process.family, process.prediction)

    def check_cameras(self, cameras: Sequence[str]) -> None:
        """Raises `InputError` for cameras that the policy sees, where it cannot learn from pictures. Here: it can."""

    def check_teacher(self, theirs: Sampler, own: Sampler) -> None:
        """Raises `InputError` for a teacher whose sampler it cannot learn from."""

    def pairs(
        self, network: Network, process: Process, x0: Tensor, generator: torch.Generator | None
    ) -> Iterable[Pair]:
        """What the network says of clean chunks x0 [B, H, A], made noisy by what `generator` draws, and should say."""
        raise NotImplementedError

    def weights(self, policy: Learner, condition: Tensor, x0: Tensor) -> Tensor | None:
        """How much each example counts beside the others, [B], 1 on average; None: all alike, as here.

        condition [B, C], x0 [B, H, A]: of a training batch, as `pairs` takes it.
        """
        return None

    def further_loss(
        self,
        policy: Learner,
        obs: Mapping[str, Tensor],
        action: Tensor,
        beside: Mapping[str, Any],
        generator: torch.Generator | None,
    ) -> Tensor | None:
        """What is added to the loss of `pairs`, a scalar; None where nothing is, as here.

        obs, action, beside: of a training batch, as `DiffusionPolicy.forward` takes them.
        """
        return None

    def critics(self, policy: Any) -> nn.Module:
        """What judges what a `DiffusionPolicy` does, for an objective that is `rewarded`; it learns with the policy."""
        raise NotImplementedError

    def reduced(
        self,
        pairs: Iterable[Pair],
        process: Process,
        counts: Tensor | None,
        n: int,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar: the mean over all pairs of n examples. counts: steps that do, [n, H] bool; None: all.
        weights: of the examples, [n]; None: as the pairs say."""
        name = self.loss or ("l1" if process.prediction == "sample" else "mse")
        if weights is not None:
            pairs = [_weighted(pair, weights) for pair in pairs]
        parts = [_reduced(pair, name, counts) * _share(pair, n) for pair in pairs]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


class Denoising(Objective):
    """One time and one noise an example; the network predicts what `Process.target` says (Ho et al. 2020; Lipman et
    al. 2023)."""

    def pairs(
        self, network: Network, process: Process, x0: Tensor, generator: torch.Generator | None
    ) -> Iterator[Pair]:
        def noise(n: int, g: torch.Generator | None) -> Tensor:
            return torch.randn(n, *x0.shape[1:], generator=g, device=x0.device, dtype=x0.dtype)

        times = drawn(lambda n, g: process.draw_times(n, generator=g, device=x0.device), len(x0), generator)
        eps = drawn(noise, len(x0), generator)
        yield Pair(network(process.add_noise(x0, eps, times), times), process.target(x0, eps, times))


class TwoRegressions(Denoising):
    """The same for the process `Mip`: two regressions ("Much Ado About Noising", Pan et al. 2025)."""

    family = "mip"


def _weighted(pair: Pair, weights: Tensor) -> Pair:
    own = weights if pair.rows is None else weights[pair.rows]
    return pair._replace(weight=own if pair.weight is None else own * pair.weight)


def _reduced(pair: Pair, name: str, counts: Tensor | None) -> Tensor:
    loss = LOSSES[name]
    if counts is None and pair.weight is None:
        return loss(pair.output, pair.target)
    errors = loss(pair.output, pair.target, reduction="none")
    if pair.weight is not None:
        errors = errors * pair.weight.view(-1, 1, 1)
    if counts is None:
        return errors.mean()
    counted = (counts if pair.rows is None else counts[pair.rows]).unsqueeze(-1).expand_as(errors)
    return (errors * counted).sum() / counted.sum().clamp_min(1)


def _share(pair: Pair, n: int) -> float:
    return 1.0 if pair.rows is None else len(pair.rows) / n
