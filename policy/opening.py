"""A policy from where it lies: a bundle, which torch computes, or an ONNX file, for ONNX Runtime, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.reading import GOLDEN_TOLERANCE
from action_diffusion.policy.runtime.onnx_file import is_onnx
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy

if TYPE_CHECKING:
    import torch

    from action_diffusion.policy.policy import DiffusionPolicy

RUNTIMES = ("torch", "onnx")
UNSET: dict[str, tuple[Any, ...]] = {"precision": (None, "fp32"), "compile": (False,), "cuda_graph": (False,)}
"""What does not ask for anything, of options that are ways of torch to compute."""


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    runtime: str | None = None,
    threads: int | None = None,
    verify: bool = False,
    **options: Any,
) -> DiffusionPolicy | OnnxPolicy:
    """Load a policy, ready to `predict`.

    path: a bundle's folder, or a file of `action-diffusion bundle export format=onnx`. runtime: "torch" or "onnx"; None
    is what the path says. threads: of the CPU, with which an ONNX file computes; None: one for each core. verify: also
    compute the golden pair and compare. options: those of `bundle.load`, for a bundle; an ONNX file is a fixed graph.
    Raises `InputError` naming the file and what is wrong with it.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    path = Path(path)
    if not is_onnx(path):
        if runtime == "onnx":
            raise InputError(
                f"runtime=onnx reads a file: action-diffusion bundle export in={path} out=policy.onnx format=onnx"
            )
        if threads is not None:
            raise InputError("threads is for ONNX files: for a bundle, torch.set_num_threads says how many")
        from action_diffusion.policy import bundle

        return bundle.load(path, device, verify=verify, **options)
    if runtime == "torch":
        raise InputError(f"{path} is an ONNX file: runtime=torch loads the bundle that it was exported from")
    check_fixed(path, options)
    policy = OnnxPolicy.load(path, device=str(device), threads=threads)
    if verify:
        policy.verify(GOLDEN_TOLERANCE)
    return policy


def check_fixed(path: Path, options: Mapping[str, Any]) -> None:
    """`InputError` for options that would change how an ONNX file computes."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name == "sampler":
            flat |= {f"sampler.{part}": wanted for part, wanted in (value or {}).items()}
        elif name == "given":
            flat |= {f"{part}.{option}": one for part, of in (value or {}).items() for option, one in of.items()}
        else:
            flat[name] = value
    for name, value in flat.items():
        if value not in UNSET.get(name, (None, [], ())):
            raise InputError(f"{name}: {path} is an ONNX file, in which nothing can be changed: give it the bundle")
