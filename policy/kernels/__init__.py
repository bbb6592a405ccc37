"""What is faster than the plain layers and gives the same: one door for all of it.

    for_training(policy)                          each layer the fastest way that there is on this machine
    accelerate(policy, precision="fp32")          the same for inference, and a denoising step as one call
    accelerate(policy, precision="fp16")          half the bytes to read in every step
    accelerate(policy, cuda_graph=True)           a chunk as one graph of few kernels

Kernels stand in a module's place (`module.forward = …`), and the module knows nothing of it. Where several ways give
the same, the fastest here is taken (`action_diffusion.choice`; `action-diffusion info` shows which). Weights stay where
they are, are trained, saved and differentiated as ever, and what is laid out of them follows when they change.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.kernels import cpu_unet, gpu_unet, layers
from action_diffusion.policy.kernels.cuda_graph import CudaGraph
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d

if TYPE_CHECKING:
    from action_diffusion.policy.policy import DiffusionPolicy

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the denoiser's weights; sums, norms and activations are fp32."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, H, A], film [B, F]) → output [B, H, A]."""


def for_training(module: nn.Module) -> None:
    """Let a policy on a CPU compute loss, gradient and chunks the fastest way here; elsewhere nothing changes."""
    layers.remove(module)
    if all(parameter.is_cpu for parameter in module.parameters()):
        layers.install(module, keep=False)


def accelerate(
    policy: DiffusionPolicy, *, precision: str | None = None, compile: bool = False, cuda_graph: bool = False
) -> None:
    """Prepare `policy`, on its device and in evaluation mode, to denoise faster where no gradient is asked for.

    precision: one of `PRECISIONS`, or None for the plain layers. compile: by torch.compile, which takes up to minutes
    for every new batch size and needs a C++ compiler. cuda_graph: replay the kernels of a whole chunk, or of a step
    where hooks look at each, instead of starting one by one from Python. Raises `InputError` for what this device or
    machine cannot do.
    """
    device, denoiser = policy.device, policy.denoiser
    if precision is not None:
        check_precision(precision, device)
        if precision == "fp16" and device.type == "cpu" and not isinstance(denoiser, ConditionalUnet1d):
            raise InputError(
                f"precision=fp16 on a CPU is for the denoiser unet1d, this is a {type(denoiser).__name__}: choose fp32"
            )
    if cuda_graph and device.type != "cuda":
        raise InputError(f"cuda_graph=true needs a CUDA device, the policy is on {device}")
    layers.remove(policy)
    if precision is not None:
        _install(policy, precision, whole=not compile)
    run: Denoise = denoiser.forward
    if compile:
        run = torch.compile(_with_code_of_its_own(run), fullgraph=True)
    if cuda_graph:
        run = CudaGraph(run, list(denoiser.parameters()))
    if compile or cuda_graph:
        _try(run, policy, f"compile={str(compile).lower()} cuda_graph={str(cuda_graph).lower()}")
        denoiser.__dict__["forward"] = WithoutGradient(run, denoiser.forward)
    if cuda_graph:
        policy.__dict__["chunk"] = CudaGraph(policy.chunk, list(policy.parameters()))


def check_precision(precision: str, device: torch.device) -> None:
    """`InputError` for a precision that is unknown, or that this device or installation has no kernels for."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if device.type == "cpu" and precision == "bf16":
        raise InputError("precision=bf16 is for GPUs, and on CPUs slower than fp16: choose fp32 or fp16")
    if device.type == "cpu" and precision == "fp16" and cpu_unet.library() is None:
        raise InputError(
            "precision=fp16 on a CPU needs this package's code in C, which was not compiled: pip install again where "
            "there is gcc, or choose fp32"
        )


def _install(policy: DiffusionPolicy, precision: str, *, whole: bool) -> None:
    """whole: a step of the U-Net as one call on a CPU, as few kernels on a GPU, where that can be."""
    denoiser, dtype, cpu = policy.denoiser, PRECISIONS[precision], policy.device.type == "cpu"
    if cpu:
        layers.install(policy.encoder, keep=True)
        if whole:
            layers.install(denoiser, keep=True)
    unet = isinstance(denoiser, ConditionalUnet1d)
    if unet and cpu and whole and cpu_unet.fits(denoiser):
        layers.put(cpu_unet.CpuUnet(denoiser, half=precision == "fp16"))
    elif unet and whole and gpu_unet.fits(denoiser):
        layers.put(gpu_unet.GpuUnet(denoiser, dtype=dtype))
    elif not cpu and dtype != torch.float32:
        denoiser.__dict__["forward"] = _cast(denoiser.forward, dtype)
    if unet:
        layers.put(layers.Beginning(denoiser))


def _cast(run: Denoise, dtype: torch.dtype) -> Denoise:
    def call(x: Tensor, film: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return run(x, film).float()

    return call


class WithoutGradient:
    """One way where no gradient is asked for, another where one is."""

    def __init__(self, run: Denoise, otherwise: Denoise) -> None:
        self.run, self.otherwise = run, otherwise

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        return self.otherwise(x, film) if torch.is_grad_enabled() else self.run(x, film)


def _with_code_of_its_own(run: Denoise) -> Denoise:
    """The same. torch gives up after a few compilations of a code object, and all denoisers would share one."""

    def call(x: Tensor, film: Tensor) -> Tensor:
        return run(x, film)

    code = call.__code__.replace()  # a copy; a function that is defined anew has the same one
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)


def _try(run: Denoise, policy: Any, options: str) -> None:
    """The first call, which compiles and captures: what is missing on this machine is said now."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    spec, device = policy.spec, policy.device
    obs = {key: np.zeros((1, spec.n_obs_steps, *value.shape), value.dtype) for key, value in spec.observations.items()}
    try:
        with torch.inference_mode():  # as `predict` calls it
            condition = policy.encode({key: torch.from_numpy(value).to(device) for key, value in obs.items()})
            film = policy.denoiser.prepare(condition, policy.sampler.times(device)).at(0)
            channels = spec.noise_shape[1] + (policy.max_delay > 0)
            run(torch.zeros(1, spec.horizon, channels, device=device), film)
    except (TorchDynamoException, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{options} does not work on this machine: {reason}") from None


__all__ = ["PRECISIONS", "accelerate", "check_precision", "for_training"]
