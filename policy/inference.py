"""How many threads predict the fastest, and what commands may ask of `policy.kernels`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy

if TYPE_CHECKING:
    from action_diffusion.policy.policy import DiffusionPolicy

OPTIONS = ("precision", "compile", "cuda_graph")
"""What `kernels.accelerate` takes, as configurations name it."""


def choose_threads(policy: DiffusionPolicy | OnnxPolicy, *, rounds: int = 5) -> int:
    """Predict with one thread (of torch, or of ONNX Runtime) or with all, whichever is faster here; returns how many.

    The first prediction, which allocates memory and picks kernels, is made here too.
    A small network at batch 1 is hundreds of short operations, and handing them to a second core and waiting for it can
    take longer than doing them. All threads have to save a tenth: they also suffer more from other programs. On a
    device other than the CPU nothing changes. For the process: threads that have computed before keep their number.
    """
    if isinstance(policy, OnnxPolicy):
        return policy.choose_threads(rounds)
    import torch

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


def choose_shared_threads(policies: Iterable[DiffusionPolicy | OnnxPolicy], *, at_once: int = 1) -> None:
    """`choose_threads` for policies of which so many compute at once; of those by torch all get what one needs."""
    by_torch = []
    for policy in policies:
        if isinstance(policy, OnnxPolicy):
            policy.use(max(1, policy.threads // at_once))
            policy.choose_threads()
        else:
            by_torch.append(policy)
    if not by_torch:
        return
    import torch

    most, chosen = max(1, torch.get_num_threads() // at_once), []
    for policy in by_torch:
        torch.set_num_threads(most)
        chosen.append(choose_threads(policy))
    torch.set_num_threads(max(chosen))
