"""The diffusion process: how noise is added in training, and how one canonical state is read off in sampling.

Every scheduler here keeps a sample of the form `x = a · x0 + b · eps`:

    family       a          b            members (all of diffusers)
    diffusion    √ᾱ_k       √(1 − ᾱ_k)   DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler
    flow         1 − s      s            FlowMatchEulerDiscreteScheduler

so whatever the network predicts, its output is turned into `x0_hat` once, here, and the diffusers scheduler is
run with that (`prediction_type="sample"`, or the velocity that follows from it for flow matching). Recomputing
eps from x0 is well conditioned at every noise level; the other direction divides by √ᾱ, which is 1/2000 at the
noisiest of 100 squared-cosine steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from action_diffusion.errors import InputError, unknown

FAMILIES = {"ddpm": "diffusion", "ddim": "diffusion", "dpm_solver++": "diffusion", "flow": "flow"}
PREDICTIONS = {"diffusion": ("epsilon", "sample", "v_prediction"), "flow": ("velocity", "sample")}


@dataclass(frozen=True)
class Step:
    """One denoising step, known before the sampling loop starts. `time` is what the network is told."""

    index: int
    time: float
    a: float
    b: float

    @property
    def sigma(self) -> float:
        """Noise over signal; infinite where nothing of the signal is left."""
        return self.b / self.a if self.a > 0 else float("inf")

    @property
    def tau(self) -> float:
        """1 / (1 + sigma): 0 at pure noise, 1 at the clean sample."""
        return self.a / (self.a + self.b)


class Process(Protocol):
    """What training and sampling need to know of a diffusion process."""

    family: str
    prediction: str

    def draw_times(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Training times of n examples, float32 [n], in the unit that the network is told."""

    def add_noise(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        """`a · x0 + b · eps` at the given times. x0, eps [B, H, A]; times [B]."""

    def target(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        """What the network is trained to output, [B, H, A]."""

    def x0_from_output(self, output: Tensor, x: Tensor, step: Step) -> Tensor:
        """The network's estimate of the clean sample, [B, H, A]."""

    def solver(self, name: str, n_steps: int, **options: Any) -> Solver:
        """A sampling scheduler of this family; `InputError` for one of another family."""


class Solver:
    """A diffusers scheduler set to a number of steps, driven by `x0_hat`. Make a new one for each sampling run.

    `steps` lists what is known beforehand; `advance` goes from `x` at step i to `x` at step i + 1;
    `transition` gives the mean and the standard deviation of that move.
    """

    def __init__(self, *, scheduler: Any, steps: list[Step], advance_options: dict[str, Any]):
        self.scheduler = scheduler
        self.steps = steps
        self._options = advance_options

    def advance(self, x0_hat: Tensor, x: Tensor, step: Step, generator: Any = None) -> Tensor:
        """One step of the scheduler, [B, H, A]. `generator`: a torch.Generator or one per row."""
        output = x0_hat
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            output = (x - x0_hat) / step.b  # the scheduler's own sign: noise − x0
        time = self.scheduler.timesteps[step.index]
        return self.scheduler.step(output, time, x, generator=generator, return_dict=False, **self._options)[0]

    def transition(self, x0_hat: Tensor, x: Tensor, x_next: Tensor, step: Step) -> tuple[Tensor, float]:
        """Mean [B, H, A] and standard deviation of p(x_next | x), for log-probabilities.

        Deterministic schedulers have x_next itself and 0. For DDPM the posterior of Ho et al. 2020, eq. 7; for
        DDIM with eta > 0, Song et al. 2021, eq. 12 and 16 (the same for eta = 1).
        """
        eta = {DDPMScheduler: 1.0}.get(type(self.scheduler), self._options.get("eta", 0.0))
        if eta == 0.0:
            return x_next, 0.0
        a, b = step.a, step.b
        a_next, b_next = self._next_scales(step)
        std = eta * b_next / b * max(1.0 - (a / a_next) ** 2, 0.0) ** 0.5
        eps = (x - a * x0_hat) / b
        return a_next * x0_hat + max(b_next**2 - std**2, 0.0) ** 0.5 * eps, std

    def _next_scales(self, step: Step) -> tuple[float, float]:
        if step.index + 1 < len(self.steps):
            following = self.steps[step.index + 1]
            return following.a, following.b
        return 1.0, 0.0


class Diffusion:
    """Variance-preserving diffusion over discrete steps (Ho et al. 2020; Nichol and Dhariwal 2021).

    `prediction`: "epsilon", "sample" or "v_prediction" (Salimans and Ho 2022: v = a · eps − b · x0).
    """

    family = "diffusion"

    def __init__(
        self,
        *,
        prediction: str = "epsilon",
        num_train_timesteps: int = 100,
        beta_schedule: str = "squaredcos_cap_v2",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ):
        _check_prediction(self.family, prediction)
        if beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            raise unknown("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if num_train_timesteps < 1:
            raise InputError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 1")
        self.prediction = prediction
        self.num_train_timesteps = num_train_timesteps
        self._betas = {
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        scheduler: Any = DDPMScheduler
        self._scheduler = scheduler(**self._betas, clip_sample=False)
        self._alphas: Tensor = self._scheduler.alphas_cumprod.double()

    def draw_times(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        times = torch.randint(self.num_train_timesteps, (n,), generator=generator, device=device)
        return times.float()

    def add_noise(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        return self._scheduler.add_noise(x0, eps, times.long())

    def target(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x0
        return self._scheduler.get_velocity(x0, eps, times.long())

    def x0_from_output(self, output: Tensor, x: Tensor, step: Step) -> Tensor:
        if self.prediction == "epsilon":
            return (x - step.b * output) / step.a
        if self.prediction == "sample":
            return output
        return step.a * x - step.b * output

    def solver(self, name: str, n_steps: int, **options: Any) -> Solver:
        _check_member(self.family, name)
        _check_steps(name, n_steps, self.num_train_timesteps)
        spacing = options.pop("timestep_spacing", "linspace" if name == "dpm_solver++" else "trailing")
        common: dict[str, Any] = dict(self._betas, prediction_type="sample", timestep_spacing=spacing)
        advance: dict[str, Any] = {}
        scheduler: Any
        if name == "dpm_solver++":
            scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", **options)
        else:
            if spacing == "trailing" and self.num_train_timesteps % n_steps:
                # diffusers steps back by T // n whatever the rounded timesteps are, so the levels would drift.
                raise InputError(
                    f"sampler.num_inference_steps={n_steps} does not divide {self.num_train_timesteps} training "
                    f"steps, as trailing spacing needs: use {_divisors(self.num_train_timesteps)}, "
                    "or sampler.timestep_spacing=leading"
                )
            if name == "ddim":
                advance["eta"] = float(options.pop("eta", 0.0))
            cls = DDIMScheduler if name == "ddim" else DDPMScheduler
            scheduler = cls(**common, clip_sample=False, **options)
        scheduler.set_timesteps(n_steps)
        steps = []
        for index, k in enumerate(scheduler.timesteps.tolist()):
            alpha = float(self._alphas[int(k)])
            steps.append(Step(index, float(k), alpha**0.5, (1.0 - alpha) ** 0.5))
        return Solver(scheduler=scheduler, steps=steps, advance_options=advance)


class Flow:
    """Rectified flow between noise and data (Liu et al. 2023; Lipman et al. 2023), time s from 1 (noise) to 0.

    `prediction`: "velocity" (x0 − eps) or "sample". The network is told 100 · s.
    """

    family = "flow"
    TIME_SCALE = 100.0

    def __init__(self, *, prediction: str = "velocity"):
        _check_prediction(self.family, prediction)
        self.prediction = prediction

    def draw_times(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return self.TIME_SCALE * (1.0 - torch.rand(n, generator=generator, device=device))

    def add_noise(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        s = (times / self.TIME_SCALE).to(x0.dtype).view(-1, 1, 1)
        return (1.0 - s) * x0 + s * eps

    def target(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        return x0 if self.prediction == "sample" else x0 - eps

    def x0_from_output(self, output: Tensor, x: Tensor, step: Step) -> Tensor:
        return output if self.prediction == "sample" else x + step.b * output

    def solver(self, name: str, n_steps: int, **options: Any) -> Solver:
        _check_member(self.family, name)
        _check_steps(name, n_steps, None)
        scheduler: Any = FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n_steps, n_steps).tolist())
        steps = [
            Step(index, self.TIME_SCALE * s, 1.0 - s, s)
            for index, s in enumerate(scheduler.sigmas[:-1].double().tolist())
        ]
        return Solver(scheduler=scheduler, steps=steps, advance_options={})


def _check_prediction(family: str, prediction: str) -> None:
    if prediction not in PREDICTIONS[family]:
        raise unknown("prediction", prediction, PREDICTIONS[family], f"a {family} process")


def _check_member(family: str, name: str) -> None:
    if name not in FAMILIES:
        raise unknown("sampler.scheduler", name, FAMILIES)
    if FAMILIES[name] != family:
        fitting = ", ".join(key for key, value in FAMILIES.items() if value == family)
        raise InputError(
            f"sampler.scheduler={name} is of the {FAMILIES[name]} family, but the policy was trained as "
            f"{family}: choose from {fitting}"
        )


def _check_steps(name: str, n_steps: int, most: int | None) -> None:
    if n_steps < 1 or (most is not None and n_steps > most):
        limit = f"between 1 and {most}" if most is not None else "at least 1"
        raise InputError(f"sampler.num_inference_steps={n_steps} for {name} must be {limit}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
