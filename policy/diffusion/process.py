"""The diffusion process: how noise is added in training, and how one canonical state is read off in sampling.

Every scheduler here keeps a sample of the form `x = a · x0 + b · eps`:

    family       a          b            members (all of diffusers)
    diffusion    √ᾱ_k       √(1 − ᾱ_k)   DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler
    flow         1 − s      s            FlowMatchEulerDiscreteScheduler
    mip          0, 0.9     0, 0.1       none: two regressions, no solver
    masked       1 − s      s            none: values that are there or not (`masked`)

so whatever the network predicts, its output is turned into `x0_hat` once, here, and the diffusers scheduler is
driven by that (`prediction_type="sample"`, or the velocity that follows from it for flow matching). Recomputing
eps from x0 is well conditioned at every noise level; the other direction divides by √ᾱ, which is 1/2000 at the
noisiest of 100 squared-cosine steps.

Driven so, every step of these schedulers is linear: `solver` says what each does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from action_diffusion.options.policy import (
    accepted_steps,
    check_member,
    check_n_inference,
    check_sampler,
    check_trailing,
)
from action_diffusion.policy.diffusion.solver import CLEAN, NOISE, Move, Solver, Step, UnmetLevels

PREDICTIONS = {
    "diffusion": ("epsilon", "sample", "v_prediction"),
    "flow": ("velocity", "sample"),
    "masked": ("sample",),
    "mip": ("sample",),
}
UNEVEN = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
"""Options of DPM-Solver++ with which its steps lie between those of training."""


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
        """A sampling scheduler of this family.

        Raises `InputError` for one of another family, and for options with which a step would not end at the noise
        level that the next one begins at, or the first would not begin at noise.
        """


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
        check_prediction(self.family, prediction)
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
        end = float(1.0 - self._alphas[-1]) ** 0.5
        if not NOISE <= end <= 1.0:
            raise InputError(
                f"policy.process: beta_schedule={beta_schedule} over {num_train_timesteps} steps ends at {end:.2f} of "
                f"noise, expected at least {NOISE}: use squaredcos_cap_v2, or num_train_timesteps=1000"
            )

    def draw_times(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        times = torch.randint(self.num_train_timesteps, (n,), generator=generator, device=device)
        return times.float()

    def add_noise(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        result: Tensor = self._scheduler.add_noise(x0, eps, times.long())
        return result

    def target(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x0
        result: Tensor = self._scheduler.get_velocity(x0, eps, times.long())
        return result

    def x0_from_output(self, output: Tensor, x: Tensor, step: Step) -> Tensor:
        if self.prediction == "epsilon":
            return (x - step.b * output) / step.a
        if self.prediction == "sample":
            return output
        return step.a * x - step.b * output

    def solver(self, name: str, n_steps: int, **options: Any) -> Solver:
        check_member(self.family, name)
        check_n_inference(name, n_steps, self.num_train_timesteps)
        options = given(name, options)
        spacing = options.pop("timestep_spacing", "linspace" if name == "dpm_solver++" else "trailing")
        common: dict[str, Any] = dict(self._betas, prediction_type="sample", timestep_spacing=spacing)
        advance: dict[str, Any] = {}
        scheduler: Any
        if name == "dpm_solver++":
            scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", **options)
        else:
            if spacing == "trailing":
                check_trailing(n_steps, self.num_train_timesteps)
            if name == "ddim":
                advance["eta"] = float(options.pop("eta", 0.0))
                advance["keeps_noise"] = not options.pop("use_clipped_model_output", True)
            cls = DDIMScheduler if name == "ddim" else DDPMScheduler
            scheduler = cls(**common, clip_sample=False, **options)
        try:
            scheduler.set_timesteps(n_steps)
            steps = self._steps(scheduler, uneven=any(options.get(option) for option in UNEVEN))
            return Solver.of(scheduler, steps, (CLEAN, self._step(n_steps, 0.0)), **advance)
        except (IndexError, ValueError) as error:  # of diffusers, where options do not go together
            if isinstance(error, InputError) and not isinstance(error, UnmetLevels):
                raise
            chosen = {"timestep_spacing": spacing, **options, "num_inference_steps": n_steps}
            listed = " ".join(f"{option}={str(value).lower()}" for option, value in chosen.items())
            raise InputError(
                f"sampler: {name} with {listed}: {error}; {accepted_steps(self.num_train_timesteps)}"
            ) from None

    def _step(self, index: int, time: float) -> Step:
        """At a training step; between two of them, where the logarithm of sigma is that much between theirs."""
        alpha = float(self._alphas[int(time)])
        if time != int(time):
            sigma = math.exp(np.interp(time, np.arange(len(self._log_sigmas)), self._log_sigmas))
            alpha = 1.0 / (1.0 + sigma**2)
        return Step(index, time, alpha**0.5, (1.0 - alpha) ** 0.5)

    def _steps(self, scheduler: Any, *, uneven: bool) -> list[Step]:
        times = scheduler.timesteps.double().numpy()
        if uneven:  # diffusers rounds what the network is told, and then its levels are not those of the samples
            sigmas = scheduler.sigmas[: len(times)].double().numpy()
            times = np.interp(np.log(sigmas), self._log_sigmas, np.arange(len(self._log_sigmas)))
        if not 0 <= times.min() <= times.max() <= self.num_train_timesteps - 1 or (np.diff(times) >= 0).any():
            raise UnmetLevels(f"its steps leave the {self.num_train_timesteps} of training, or stand still")
        return [self._step(index, time) for index, time in enumerate(times.tolist())]

    @property
    def _log_sigmas(self) -> np.ndarray:
        return 0.5 * (torch.log1p(-self._alphas) - torch.log(self._alphas)).numpy()


class Flow:
    """Rectified flow between noise and data (Liu et al. 2023; Lipman et al. 2023), time s from 1 (noise) to 0.

    `prediction`: "velocity" (x0 − eps) or "sample". The network is told 100 · s.
    """

    family = "flow"
    TIME_SCALE = 100.0

    def __init__(self, *, prediction: str = "velocity"):
        check_prediction(self.family, prediction)
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
        check_member(self.family, name)
        check_n_inference(name, n_steps, None)
        options = given(name, options)
        scheduler: Any = FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n_steps, n_steps).tolist())
        steps = [
            Step(index, self.TIME_SCALE * s, 1.0 - s, s)
            for index, s in enumerate(scheduler.sigmas[:-1].double().tolist())
        ]
        return Solver.of(scheduler, steps, (CLEAN,))


class Mip:
    """No diffusion: the minimal iterative policy's two regressions ("Much Ado About Noising", Pan et al. 2025).

        from nothing      x = 0                                      told 100
        from nearly all   x = level · x0 + (1 − level) · eps         told 100 · (1 − level)

    both to the clean chunk. An example of training is one of them, each as often. Sampling does the first, and the
    second with what the first said, without noise; in one step the first alone, which is plain regression.
    """

    family = "mip"

    def __init__(self, *, prediction: str = "sample", level: float = 0.9):
        check_prediction(self.family, prediction)
        if not 0.0 < level < 1.0:
            raise InputError(f"policy.process.level={level} must be between 0 and 1")
        self.prediction, self.level = prediction, level

    def draw_times(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        first = torch.rand(n, generator=generator, device=device) < 0.5
        return torch.where(first, Flow.TIME_SCALE, Flow.TIME_SCALE * (1.0 - self.level))

    def add_noise(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        nearly = (times < Flow.TIME_SCALE).to(x0.dtype).view(-1, 1, 1)
        return nearly * (self.level * x0 + (1.0 - self.level) * eps)

    def target(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        return x0

    def x0_from_output(self, output: Tensor, x: Tensor, step: Step) -> Tensor:
        return output

    def solver(self, name: str, n_steps: int, **options: Any) -> Solver:
        check_member(self.family, name)
        check_n_inference(name, n_steps, 2)
        given(name, options)
        steps = [
            Step(0, Flow.TIME_SCALE, 0.0, 0.0),
            Step(1, Flow.TIME_SCALE * (1.0 - self.level), self.level, 1.0 - self.level),
        ]
        scales = [self.level, 1.0][-n_steps:]
        moves = [Move(keep=0.0, blend=(scale,), spread=0.0, draws=False) for scale in scales]
        return Solver(steps=steps[:n_steps], moves=moves, start=0.0)


def check_prediction(family: str, prediction: str) -> None:
    if prediction not in PREDICTIONS[family]:
        raise unknown("prediction", prediction, PREDICTIONS[family], f"a {family} process")


def given(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not null, all of them the scheduler's."""
    given = {option: value for option, value in options.items() if value is not None}
    check_sampler(name, given)
    return given
