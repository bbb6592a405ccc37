"""A denoising step in few kernels of a GPU is what the layers of the U-Net give.

Without a GPU the kernel runs in Triton's interpreter, and is compiled for one, which needs none.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import inputs, unet

from action_diffusion.policy.kernels import gpu_unet
from action_diffusion.policy.kernels.gpu_unet import GpuUnet

pytest.importorskip("triton", reason="the package triton is not installed: torch for CUDA on Linux brings it along")


NETS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (8, 2, {"channels": (16, 40), "n_groups": 2}),
    (4, 1, {"channels": (16, 24, 40), "kernel_size": 3, "n_groups": 2, "action_dim": 7, "activation": "mish"}),
    (3, 2, {"channels": (24,), "kernel_size": 7, "n_groups": 2, "marked": True, "activation": "gelu"}),
    (2, 2, {"channels": (16, 8), "kernel_size": 1, "n_groups": 4, "activation": "relu"}),
)
"""Steps, rows and options of U-Nets: few rows and groups, for each of which the interpreter runs a program."""
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


@pytest.mark.slow
def test_a_step_is_what_the_layers_give():
    """In a process of its own: whether triton interprets is decided when it is imported."""
    code = "import test_gpu_unet; test_gpu_unet.compare()"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def compare() -> None:
    """Raises `AssertionError` where a step differs by more than `ERRORS`."""
    for steps, rows, options in NETS:
        net = unet(**options)
        with torch.no_grad():
            x, film = inputs(net, steps, rows)
            expected = net(x, film)
            for dtype, error in ERRORS.items():
                found = GpuUnet(net, dtype=dtype).run(x, film)
                torch.testing.assert_close(
                    found, expected, atol=error, rtol=0, msg=functools.partial("{}: {}".format, dtype)
                )


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "mish", "relu", "gelu"])
def test_the_kernel_compiles_for_a_gpu(activation):
    """For compute capability 9.0, with every option."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = importlib.import_module("action_diffusion.policy.kernels.norm_kernel")._between
    fixed = {
        "steps": 16,
        "steps_block": 16,
        "group_block": 64,
        "out_taps": 5,
        "other_taps": 3,
        "activation": activation,
    }
    fixed |= {f"has_{part}": True for part in ("bias", "norm", "film", "add")}
    types = dict.fromkeys(("y", "add", "out", "other"), "*bf16") | dict.fromkeys(("bias", "gamma", "beta"), "*fp32")
    types |= {"film": "*fp32", "eps": "fp32"} | dict.fromkeys(fixed, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


def test_what_it_leaves_to_the_layers():
    net = unet()
    kernel = GpuUnet(net, dtype=torch.float32)
    x, film = inputs(net, 8, 2)
    with torch.no_grad():
        assert kernel.takes(x, film)
        assert not kernel.takes(x.double(), film)
        assert not kernel.takes(x[..., :1], film), "other actions"
        assert not kernel.takes(x[:, :7], film), "a horizon that cannot be halved"
        assert not kernel.takes(torch.zeros(1, 2**13, 2), film), "more steps than a program holds"
        net.train()
        assert not kernel.takes(x, film), "a network in training"
    net.eval()
    assert not kernel.takes(x, film), "a gradient"


def test_what_is_in_the_way_is_said(monkeypatch):
    """Here, that there is no GPU or no kernel for it."""
    kernel = importlib.import_module("action_diffusion.policy.kernels.norm_kernel")

    def broken(*args, **options):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(kernel, "between", broken)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(size))
    gpu_unet.works.cache_clear()
    with pytest.warns(UserWarning, match=r"not fused on this GPU, which makes them slower: no compiler$"):
        assert not gpu_unet.works()
    gpu_unet.works.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("activation", "dtype", "error"),
    [
        ("silu", torch.float32, 2e-5),
        ("mish", torch.float32, 2e-5),
        ("silu", torch.float16, 2e-2),
        ("silu", torch.bfloat16, 1e-1),
    ],
)
def test_on_a_gpu_a_step_is_what_the_layers_give(activation, dtype, error):
    assert gpu_unet.works()
    net = unet(channels=(128, 256), activation=activation)
    with torch.no_grad():
        for batch in (1, 3):
            x, film = (part.cuda() for part in inputs(net.cpu(), 16, batch))
            expected = net.cuda()(x, film)
            torch.testing.assert_close(GpuUnet(net, dtype=dtype)(x, film), expected, atol=error, rtol=0)
