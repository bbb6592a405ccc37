"""Loss and gradient of a training step as one CUDA graph: what Python starts kernel by kernel is started at once.

    batch ─copied─▶ static tensors ─▶ ┌ forward, backward: captured once ┐ ─▶ loss, and .grad of every parameter
    seed of the step ───────────────▶ └ its random numbers as without it ┘

A policy of a few million weights is some thousand kernels of a few microseconds a step, which Python starts more slowly
than a GPU runs them. Clipping, optimiser and EMA are a handful of fused kernels each and stay outside, so that learning
rate and decay change as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from action_diffusion.datasets.batches.loader import Batch
from action_diffusion.errors import InputError
from action_diffusion.policy.kernels.cuda_graph import Graph


class CapturedGradient:
    """Replays `gradient(batch, generator)`, captured at its first call; no other tensor may become its input later.

    gradient: computes the loss of a batch, a scalar, and adds its gradient to the `.grad` of `parameters`. All batches
    have the shapes of the first. Gradients stay in the memory that the graph writes to: nobody sets them to None.
    """

    def __init__(
        self,
        gradient: Callable[[Batch, torch.Generator], Tensor],
        parameters: Sequence[Tensor],
        device: torch.device,
    ):
        self._gradient, self._parameters = gradient, parameters
        self._generator = torch.Generator(device)
        self._graph: Graph | None = None

    def __call__(self, batch: Batch, seed: int) -> Tensor:
        """The loss of `batch` with the random numbers of a generator with this seed; a tensor of its own."""
        keys, gains = list(batch.obs), [] if batch.gain is None else [batch.gain]
        tensors = [*batch.obs.values(), batch.action, batch.mask, *gains]
        if self._graph is None:

            def loss(*given: Tensor) -> Tensor:
                observations, (action, mask, *gain) = given[: len(keys)], given[len(keys) :]
                obs = dict(zip(keys, observations, strict=True))
                batch = Batch(obs, action, mask, gain=gain[0] if gain else None)
                return self._gradient(batch, self._generator).detach()

            self._graph = Graph(loss, tensors, generator=self._generator, before=self._forget)
        self._generator.manual_seed(seed)
        result: Tensor = self._graph(*tensors)
        return result

    def _forget(self) -> None:
        """So that the graph writes gradients instead of adding to them."""
        for parameter in self._parameters:
            parameter.grad = None


def check_capturable(*, device: torch.device, processes: int, accumulation: int, mixed_precision: str) -> None:
    """`InputError` where `train.cuda_graph=true` does not go with the rest of the run."""
    for wrong, why in (
        (device.type != "cuda", f"needs a CUDA device, this run is on {device}"),
        (processes > 1, f"is for one process, train.num_processes={processes}"),
        (accumulation > 1, f"captures a whole step, train.gradient_accumulation_steps={accumulation}: give 1"),
        (mixed_precision == "fp16", "does not go with train.mixed_precision=fp16, whose scale changes: use bf16"),
    ):
        if wrong:
            raise InputError(f"train.cuda_graph=true {why}")
