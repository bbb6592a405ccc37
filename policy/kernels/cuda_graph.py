"""CUDA graphs: kernels that Python starts one by one, captured once and replayed at once.

A chunk at batch 1, or a training step of a small network, is thousands of kernels of a few microseconds, which Python
starts more slowly than a GPU runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from action_diffusion.policy.kernels.layers import stamp

WARM_UP = 3
"""Calls before a capture, in which libraries allocate memory and choose kernels."""


class Graph:
    """The kernels that `function` starts for tensors like `inputs`, in static memory.

    generator: whose random numbers the function draws; each replay then draws those of its present state. before:
    called before every call of the function, such as to let gradients go.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        *,
        generator: torch.Generator | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self._graph.register_generator_state(generator)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                before()
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        before()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """A tensor or a tuple of them, in memory of their own."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        output = self._output
        return output.clone() if isinstance(output, Tensor) else tuple(part.clone() for part in output)


class CudaGraph:
    """Replays a function of tensors, captured once for each shape of its inputs.

    It must do the same for all inputs of a shape. Past `most_shapes`, and as a part of another function that is being
    captured, it is called as it is. weights: what it computes with; it is captured anew when these have changed.
    """

    most_shapes = 8
    capturing = False

    def __init__(self, function: Callable[..., Any], weights: Sequence[Tensor] = ()) -> None:
        self.function, self._weights = function, tuple(weights)
        self._stamp = stamp(self._weights)
        self._captured: dict[tuple[Any, ...], Graph] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if (now := stamp(self._weights)) != self._stamp:
            self._captured, self._stamp = {}, now
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if CudaGraph.capturing or (key not in self._captured and len(self._captured) == self.most_shapes):
            return self.function(*inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        return self._captured[key](*inputs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, inputs: tuple[Tensor, ...]) -> Graph:
        CudaGraph.capturing = True
        try:
            return Graph(self.function, inputs)
        finally:
            CudaGraph.capturing = False
