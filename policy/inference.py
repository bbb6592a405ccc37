"""Faster ways to run a policy's denoiser, chosen when it is loaded: precision, compilation, CUDA graphs.

    policy.load(bundle)                                       the weights as they were trained
    policy.load(bundle, precision="fp32")                     the same, laid out for its device; equal within 1e-5
    policy.load(bundle, precision="fp16")                     half the bytes to read in every step
    policy.load(bundle, "cuda", precision="fp16", cuda_graph=True)    a chunk as one graph of few kernels

Where weights get gradients (training, fine-tuning) they run themselves, and whatever was prepared is forgotten when the
policy is trained, moved, or given other weights. Guidance, which differentiates with respect to the sample, runs at the
precision asked for when the weights are frozen (`policy.requires_grad_(False)`), but not compiled.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.packing import Conv2d, check_precision
from action_diffusion.policy.policy import DiffusionPolicy

OPTIONS = ("precision", "compile", "cuda_graph")
"""What `accelerate` takes, as configurations name it."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, H, A], film [B, F]) → output [B, H, A]."""


def accelerate(
    policy: DiffusionPolicy, *, precision: str | None = None, compile: bool = False, cuda_graph: bool = False
) -> None:
    """Prepare `policy`, on its device and in evaluation mode, to denoise faster where no gradient is asked for.

    precision: one of `packing.PRECISIONS`, or None for the weights as they are. compile: by torch.compile, which takes
    up to minutes for every new batch size and needs a C++ compiler. cuda_graph: replay the kernels of a whole chunk,
    or of a step where hooks look at each, instead of starting one by one from Python. Raises `InputError` for what this
    device or machine cannot do.
    """
    device, denoiser = policy.device, policy.denoiser
    if precision is not None:
        check_precision(precision, device)
    if cuda_graph and device.type != "cuda":
        raise InputError(f"cuda_graph=true needs a CUDA device, the policy is on {device}")
    denoiser.forget()
    policy.prepared = None
    if precision is not None:
        denoiser.pack(precision, whole=not compile)
        for layer in policy.encoder.modules():
            if isinstance(layer, Conv2d):
                layer.pack()  # in fp32, whatever the precision
    run: Denoise = denoiser.run
    if compile:
        run = torch.compile(_with_code_of_its_own(run), fullgraph=True)
    if cuda_graph:
        run = CudaGraph(run)
    if run != denoiser.run:
        _try(run, policy, f"compile={str(compile).lower()} cuda_graph={str(cuda_graph).lower()}")
        denoiser.prepared = run
    if cuda_graph:
        policy.prepared = CudaGraph(policy.plain)


def _with_code_of_its_own(run: Denoise) -> Denoise:
    """The same. torch gives up after a few compilations of a code object, and all denoisers would share one."""

    def call(x: Tensor, film: Tensor) -> Tensor:
        return run(x, film)

    code = call.__code__.replace()  # a copy; a function that is defined anew has the same one
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)


def choose_threads(policy: DiffusionPolicy, *, rounds: int = 5) -> int:
    """Predict with one of torch's threads or with all of them, whichever is faster here; returns how many.

    The first prediction, which allocates memory and picks kernels, is made here too.
    A small network at batch 1 is hundreds of short operations, and handing them to a second core and waiting for it can
    take longer than doing them. All threads have to save a tenth: they also suffer more from other programs. On a
    device other than the CPU nothing changes. For the process: threads that have computed before keep their number.
    """
    spec, most = policy.spec, torch.get_num_threads()
    obs = {key: np.zeros((spec.n_obs_steps, *value.shape), value.dtype) for key, value in spec.observations.items()}
    policy.predict(obs)
    if policy.device.type != "cpu" or most == 1:
        return most
    seconds: dict[int, list[float]] = {1: [], most: []}
    for _ in range(rounds):
        for threads, times in seconds.items():
            torch.set_num_threads(threads)  # which also forgets kernels that were set up
            policy.predict(obs)
            began = time.perf_counter()
            policy.predict(obs)
            times.append(time.perf_counter() - began)
    alone, together = (statistics.median(times) for times in seconds.values())
    chosen = most if together < 0.9 * alone else 1
    torch.set_num_threads(chosen)
    return chosen


def _try(run: Denoise, policy: DiffusionPolicy, options: str) -> None:
    """The first call, which compiles and captures: what is missing on this machine is said now."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    denoiser = policy.denoiser
    x = torch.zeros(1, policy.spec.horizon, denoiser.input_dim, device=policy.device)
    film = torch.zeros(1, sum(denoiser.film_sizes), device=policy.device)
    try:
        with torch.inference_mode():  # as `predict` calls it
            run(x, film)
    except (TorchDynamoException, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{options} does not work on this machine: {reason}") from None


@dataclass(frozen=True)
class _Captured:
    graph: Any
    inputs: list[Tensor]
    output: Any


class CudaGraph:
    """Replays the kernels that a function of tensors started, captured once for each shape of its inputs.

    A chunk at batch 1 is thousands of kernels of a few microseconds, which Python starts more slowly than they run. The
    function gives a tensor or a tuple of them, and must do the same for all inputs of a shape. Past `most_shapes`, and
    as a part of another function that is being captured, it is called as it is.
    """

    most_shapes = 8
    capturing = False

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if CudaGraph.capturing or (key not in self._captured and len(self._captured) == self.most_shapes):
            return self.function(*inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        captured = self._captured[key]
        for own, given in zip(captured.inputs, inputs, strict=True):
            own.copy_(given)
        captured.graph.replay()
        output = captured.output
        return output.clone() if isinstance(output, Tensor) else tuple(part.clone() for part in output)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, inputs: tuple[Tensor, ...]) -> _Captured:
        own = [tensor.clone() for tensor in inputs]
        CudaGraph.capturing = True
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate and choose kernels in their first calls
                for _ in range(3):
                    self.function(*own)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.function(*own)
        finally:
            CudaGraph.capturing = False
        return _Captured(graph, own, output)
