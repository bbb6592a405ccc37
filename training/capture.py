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

from action_diffusion.datasets.batches import Batch
from action_diffusion.errors import InputError

WARM_UP = 3
"""Calls before the capture, in which libraries allocate memory and choose kernels."""


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
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._generator)
        self._batch: Batch | None = None
        self._loss: Tensor | None = None

    def __call__(self, batch: Batch, seed: int) -> Tensor:
        """The loss of `batch` with the random numbers of a generator with this seed; a tensor of its own."""
        if self._batch is None or self._loss is None:
            self._batch, self._loss = self._capture(batch)
        else:
            for own, given in zip(_tensors(self._batch), _tensors(batch), strict=True):
                own.copy_(given)
        self._generator.manual_seed(seed)
        self._graph.replay()
        return self._loss.clone()

    def _capture(self, batch: Batch) -> tuple[Batch, Tensor]:
        own = Batch({key: value.clone() for key, value in batch.obs.items()}, batch.action.clone(), batch.mask.clone())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._forget()
                self._gradient(own, self._generator)
        torch.cuda.current_stream().wait_stream(side)
        self._forget()  # so that the graph writes gradients instead of adding to them
        with torch.cuda.graph(self._graph):
            loss = self._gradient(own, self._generator)
        return own, loss.detach()

    def _forget(self) -> None:
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


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.obs.values(), batch.action, batch.mask]
