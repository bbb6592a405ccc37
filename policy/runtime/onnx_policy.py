"""A policy that ONNX Runtime computes, from a file of `bundle export format=onnx`. No torch is loaded."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.errors import InputError
from action_diffusion.policy.noise import draw
from action_diffusion.policy.runtime.onnx_file import (
    ACTION,
    NOISE,
    STEP_NOISE,
    OnnxFile,
    observation_name,
    read,
    require,
)
from action_diffusion.policy.spec import PolicySpec, action_span

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Of ONNX Runtime, by what is before the colon of `device`."""


class OnnxPolicy:
    """Predicts as `DiffusionPolicy` does, as a fixed graph: nothing acts while a chunk is made.

    `spec`: its specification. `config`: the resolved configuration that it was trained with. `runtime`: in words.
    """

    def __init__(self, file: OnnxFile, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        self.spec: PolicySpec = file.spec
        self.config: Mapping[str, Any] = file.config
        self._file, self._path, self._provider = file, path, _provider(device)
        self.runtime = f"ONNX Runtime {require('onnxruntime').__version__}"
        self.use(threads or _cores())

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", threads: int | None = None) -> OnnxPolicy:
        """From a file. device: cpu, cuda, or auto: a GPU if this ONNX Runtime can use one, or the CPU. threads: of the
        CPU; None: as many as there are cores for this process. Raises `InputError`."""
        return cls(read(Path(path)), Path(path), device=device, threads=threads)

    def use(self, threads: int) -> None:
        """Compute with so many threads of the CPU from now on (>= 1)."""
        self._session, self.threads = self._opened(threads), threads

    def choose_threads(self, rounds: int = 5) -> int:
        """Compute with one thread or with all, whichever is faster here; returns how many. All have to save a tenth."""
        most = self.threads
        if most == 1 or self._provider != PROVIDERS["cpu"]:
            return most
        seconds = {}
        for threads in (1, most):
            self.use(threads)
            seconds[threads] = self._seconds(rounds)
        self.use(most if seconds[most] < 0.9 * seconds[1] else 1)
        return self.threads

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise: np.ndarray | None = None,
        noise_generator: Any = None,
        generator: Any = None,
        step_noise: np.ndarray | None = None,
        prefix: Any = None,
        hooks: Sequence[Any] = (),
    ) -> dict[str, np.ndarray]:
        """Actions for a dictionary of numpy arrays, [To, …] or [B, To, …] each, in the data's own units.

        Returns float32 `action` [(B,) Ta, A], the steps to execute, and `action_pred` [(B,) H, A], the whole chunk.
        noise [B, H, A]: denoising begins with it, or with what `noise_generator` draws (see `policy.noise`).
        step_noise [B, K, H, A]: of the K steps that draw some; without it `generator` draws it. Raises `InputError` for
        observations that differ from `spec`, and for `prefix` and `hooks`.
        """
        if prefix is not None or len(hooks):
            raise InputError(f"{self._path}: hooks and prefix steps act in torch's policies alone: load the bundle")
        batched = self.spec.check(obs)
        rows = {key: np.asarray(obs[key])[None if not batched else ...] for key in self.spec.observations}
        n, chunk = len(next(iter(rows.values()))), (self.spec.horizon, *self.spec.action.shape)
        given = {
            observation_name(key): np.ascontiguousarray(rows[key], np.uint8 if value.kind == "image" else np.float32)
            for key, value in self.spec.observations.items()
        }
        given[NOISE] = _shaped(
            NOISE, draw((n, *chunk), noise_generator, by_numpy=True) if noise is None else noise, (n, *chunk)
        )
        if STEP_NOISE in self._file.inputs:
            k = self._file.inputs[STEP_NOISE].shape[0]
            if step_noise is None:  # a step after the other, as the sampler draws it
                step_noise = np.stack([draw((n, *chunk), generator, by_numpy=True) for _ in range(k)], axis=1)
            given[STEP_NOISE] = _shaped(STEP_NOISE, step_noise, (n, k, *chunk))
        elif step_noise is not None:
            raise InputError(f"step_noise: no step of {self._path} draws noise")
        made = self._run(given)
        if made.shape != (n, *chunk):
            raise InputError(f"{self._path} gave {ACTION} of shape {list(made.shape)}, not {[n, *chunk]}")
        now = self.spec.n_obs_steps - 1
        action = made[:, now : now + self.spec.n_action_steps]
        return {"action": action, ACTION: made} if batched else {"action": action[0], ACTION: made[0]}

    def verify(self, tolerance: float) -> float:
        """Compute the golden pair; returns the largest difference, as a share of the action's range.

        Raises `InputError` for more than `tolerance`, and where the file has no golden pair.
        """
        golden = self._file.golden
        if golden is None:
            raise InputError(f"{self._path} has no golden pair, so that it cannot be verified")
        obs = {key: golden[observation_name(key)] for key in self.spec.observations}
        found = self.predict(obs, noise=golden[NOISE], step_noise=golden.get(STEP_NOISE))
        span = np.maximum(action_span(self.spec), 1e-6)
        difference = float((np.abs(found[ACTION] - golden[ACTION][0]) / span).max())
        if not difference <= tolerance:
            raise InputError(
                f"{self._path}: ONNX Runtime's chunk for the golden input differs by {difference:.2g} of the action's "
                f"range (at most {tolerance:g})"
            )
        return difference

    def _run(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            (made,) = self._session.run([ACTION], dict(given))
        except Exception as error:  # of ONNX Runtime, which has no class for its own
            raise InputError(f"{self._path}: ONNX Runtime failed: {_line(error)}") from None
        return np.asarray(made)

    def _opened(self, threads: int) -> Any:
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what fails is raised
        try:
            return runtime.InferenceSession(self._file.data, options, providers=[self._provider])
        except Exception as error:
            raise InputError(f"{self._path}: ONNX Runtime cannot compute it: {_line(error)}") from None

    def _seconds(self, rounds: int) -> float:
        """The median time of a chunk, after one that warms up."""
        spec = self.spec
        obs = {key: np.zeros((spec.n_obs_steps, *value.shape), value.dtype) for key, value in spec.observations.items()}
        seconds = []
        for _ in range(1 + rounds):
            began = time.perf_counter()
            self.predict(obs)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])


def _provider(device: str) -> str:
    there = require("onnxruntime").get_available_providers()
    kind = device.partition(":")[0]
    if kind == "auto":
        return next(PROVIDERS[name] for name in ("cuda", "cpu") if PROVIDERS[name] in there)
    if kind not in PROVIDERS or PROVIDERS[kind] not in there:
        known = ", ".join(name for name, provider in PROVIDERS.items() if provider in there)
        raise InputError(f"device={device} is none of this ONNX Runtime: choose from {known}")
    return PROVIDERS[kind]


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shaped(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if np.shape(value) != shape:
        raise InputError(f"{name} has shape {list(np.shape(value))}, expected {list(shape)}")
    return np.ascontiguousarray(value, np.float32)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
