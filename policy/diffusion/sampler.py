"""The sampling loop and its hooks: the one place where a chunk is denoised.

Each step goes

    x ──denoiser──▶ output ──process──▶ x0_raw ──clip──▶ x0_hat ──hooks──▶ x0_hat ──clip──▶ scheduler ──▶ x_next
         ▲ wrap_denoiser                                  ▲ edit_x0                          ▲ after_step

so guidance, inpainting, caching and fine-tuning are hooks, never copies of the loop. eps and velocity are derived
from the current x0_hat, therefore always agree with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.diffusion.solver import Step

Generators = torch.Generator | Sequence[torch.Generator] | None
DenoiserCall = Callable[[Tensor, Step, Tensor | None], Tensor]
"""`(x [R, H, A], step, rows [R] or None) -> output [R, H, A]`; `rows` picks the batch rows that x stands for."""


@dataclass(frozen=True)
class StepState:
    """The canonical state of one denoising step, whatever the scheduler. Tensors are [B, H, A], normalised units.

    k: step index, counted from 0 at the noisiest. x: the sample, in the scheduler's own scale.
    x0_hat: estimate of the clean chunk, clipped when the clip target is "x0"; x0_raw: the same before clipping
    and before any hook, a differentiable function of x where gradients are on.
    """

    step: Step
    x: Tensor
    x0_hat: Tensor
    x0_raw: Tensor

    @property
    def k(self) -> int:
        return self.step.index

    @property
    def sigma(self) -> float:
        """Noise over signal."""
        return self.step.sigma

    @property
    def tau(self) -> float:
        """1 / (1 + sigma)."""
        return self.step.tau

    @property
    def eps(self) -> Tensor:
        """The noise that x and x0_hat imply, [B, H, A]; none where a step begins without any."""
        if self.step.b == 0:
            return torch.zeros_like(self.x)
        return (self.x - self.step.a * self.x0_hat) / self.step.b

    @property
    def velocity(self) -> Tensor:
        """x0_hat − eps, [B, H, A] (not the v of v-prediction)."""
        return self.x0_hat - self.eps


class Hook:
    """Base of all hooks; each method does nothing. One instance may keep state during one sampling run."""

    needs_gradient = False
    """True: the denoiser runs with gradients and `state.x` is a leaf, so that `edit_x0` can differentiate
    `state.x0_raw` with respect to `state.x`. Fails inside `torch.inference_mode`."""

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        """Called once, with the initial noise [B, H, A] and all the steps."""

    def wrap_denoiser(self, denoise: DenoiserCall) -> DenoiserCall:
        """Return the call to use instead: skip, reuse, or batch the network's evaluations."""
        return denoise

    def edit_x0(self, state: StepState) -> Tensor:
        """Return the x0_hat [B, H, A] to go on with."""
        return state.x0_hat

    def after_step(self, state: StepState, x_next: Tensor) -> Tensor:
        """Return the sample [B, H, A] to go on with; raise `StopSampling` to end here."""
        return x_next


class StopSampling(Exception):
    """Raised by a hook's `after_step` to end sampling early; `x0` [B, H, A] becomes the result."""

    def __init__(self, x0: Tensor):
        super().__init__("sampling stopped by a hook")
        self.x0 = x0


@dataclass(frozen=True)
class ChainStep:
    """One recorded transition: x → x_next ~ N(mean, std²), tensors [B, H, A]; std is 0 where deterministic."""

    step: Step
    x: Tensor
    x_next: Tensor
    mean: Tensor
    std: float


class Sampler:
    """Runs a denoiser through a diffusers scheduler.

    `scheduler`: "ddpm", "ddim", "dpm_solver++" or "flow"; `options` go to the scheduler (eta, timestep_spacing,
    solver_order, …). `clip`: "x0" keeps the estimate of the clean chunk in what was demonstrated, "x" keeps the sample
    itself there, None neither. demonstrated: (low, high) of each action dimension [A] in normalised units; None: −1 and
    1, as where the normaliser is min-max. clip_range: how many times its half width that range reaches from its middle.
    clip_to: "unit" puts −1 and 1 in the place of what was demonstrated, whatever the normaliser.
    two_times: the network is told where a step begins and where it ends, and its output is of all that way.
    """

    def __init__(
        self,
        *,
        process: Process,
        scheduler: str,
        num_inference_steps: int,
        clip: str | None = "x0",
        clip_range: float = 1.0,
        clip_to: str = "demonstrated",
        demonstrated: tuple[Tensor, Tensor] | None = None,
        two_times: bool = False,
        **options: Any,
    ):
        if clip not in ("x0", "x", None):
            raise unknown("sampler.clip", str(clip), ("x0", "x", "null"))
        self.process = process
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.clip = clip
        self.bounds = _widened(demonstrated if clip_to == "demonstrated" else None, clip_range)
        self.reach = clip_range if self.bounds is None else max(float(bound.abs().max()) for bound in self.bounds)
        """The largest normalised magnitude in the range that is clipped to."""
        self.clip_range = clip_range
        self.two_times = two_times
        self.options = options
        self._times: dict[torch.device, Tensor] = {}
        try:
            self.solver = process.solver(scheduler, num_inference_steps, **options)
        except TypeError as error:
            raise InputError(f"sampler option not known to {scheduler}: {error}") from None

    @property
    def steps(self) -> list[Step]:
        """The denoising steps, noisiest first."""
        return self.solver.steps

    def times(self, device: torch.device) -> Tensor:
        """What the network is told in each of them, float32 [K], or [K, 2]; copied to a device once."""
        if device not in self._times:
            times = [step.time for step in self.steps]
            told = list(zip(times, [*times[1:], 0.0], strict=True)) if self.two_times else times
            with torch.inference_mode(False):
                self._times[device] = torch.tensor(told, device=device)
        return self._times[device]

    def run(
        self,
        denoise: DenoiserCall,
        noise: Tensor,
        *,
        generator: Generators = None,
        step_noise: Tensor | None = None,
        hooks: Sequence[Hook] = (),
        grad: bool = False,
        return_chain: bool = False,
    ) -> tuple[Tensor, list[ChainStep]]:
        """Denoise `noise` [B, H, A] into chunks [B, H, A] in normalised units, and the chain of transitions if asked.

        step_noise: what `draw_step_noise` gave; without it, `generator` draws it here. grad=True keeps the graph
        through every step; otherwise only what a hook asks for is differentiated.
        """
        if return_chain and not self.solver.gaussian:
            raise InputError(f"return_chain: the steps of scheduler={self.scheduler} draw no normal numbers to record")
        if self.solver.start != 1.0:
            noise = self.solver.start * noise
        for hook in hooks:
            denoise = hook.wrap_denoiser(denoise)
            hook.begin(noise, self.steps)
        drawn = self.draw_step_noise(noise, generator) if step_noise is None else step_noise
        noise_of = {} if drawn is None else dict(zip(self._drawing, drawn, strict=True))
        x, estimates, chain = noise, deque[Tensor](maxlen=self.solver.memory), list[ChainStep]()
        try:
            for step, move in zip(self.steps, self.solver.moves, strict=True):
                with torch.set_grad_enabled(grad):
                    state = self._estimate(denoise, x, step, hooks, grad)
                    clipped = state.x0_hat
                    for hook in hooks:
                        edited = hook.edit_x0(state)
                        if edited is not state.x0_hat:
                            state = replace(state, x0_hat=self._clip(edited, "x0"))
                    estimates.appendleft(state.x0_hat)
                    mean = self.solver.mean(estimates, state.x, step)
                    if self.solver.keeps_noise:
                        mean = mean + self.solver.kept_noise(clipped, state.x0_raw, step)
                    x_next = mean
                    if move.spread:
                        x_next = self.solver.noisy(mean, state.x, noise_of[step.index], step)
                    x_next = self._clip(x_next, "x")
                    if return_chain:
                        chain.append(ChainStep(step, state.x, x_next, mean if move.spread else x_next, move.spread))
                    for hook in hooks:
                        x_next = hook.after_step(state, x_next)
                x = x_next
        except StopSampling as stop:
            return stop.x0, chain
        return x, chain

    @property
    def deterministic(self) -> bool:
        """Whether no step draws noise: then the initial noise alone says which chunk it becomes."""
        return not any(move.spread for move in self.solver.moves)

    @property
    def _drawing(self) -> list[int]:
        """Indices of the steps that draw noise."""
        return [index for index, move in enumerate(self.solver.moves) if move.draws]

    def draw_step_noise(self, x: Tensor, generator: Generators) -> Tensor | None:
        """The noise [K, B, H, A] of the K steps that draw some, for a sample x [B, H, A]; None where none does.

        All is drawn before the loop, so that generators of the CPU do not make a GPU wait in every step.
        """
        if not self._drawing:
            return None
        first = generator[0] if isinstance(generator, Sequence) else generator
        where = x.device if first is None else first.device
        return torch.stack([draw_noise(x.shape, generator, where, x.dtype) for _ in self._drawing]).to(x.device)

    def _estimate(self, denoise: DenoiserCall, x: Tensor, step: Step, hooks: Sequence[Hook], grad: bool) -> StepState:
        differentiate = any(hook.needs_gradient for hook in hooks)
        if differentiate and torch.is_inference_mode_enabled():
            raise RuntimeError("a sampling hook needs gradients: use torch.no_grad, not inference_mode, around sample")
        with torch.set_grad_enabled(grad or differentiate):
            if differentiate and not x.requires_grad:
                x = x.detach().requires_grad_()
            x0_raw = self.process.x0_from_output(denoise(x, step, None), x, step)
        return StepState(step, x, self._clip(x0_raw, "x0"), x0_raw)

    def mean(self, output: Tensor, x: Tensor, step: Step) -> Tensor:
        """The mean [B, H, A] that a step leads to, of what the network says of x [B, H, A], as `run` has it without
        hooks; of a scheduler that looks at its last estimate only."""
        x0_raw = self.process.x0_from_output(output, x, step)
        x0_hat = self._clip(x0_raw, "x0")
        mean = self.solver.mean([x0_hat], x, step)
        if self.solver.keeps_noise:
            mean = mean + self.solver.kept_noise(x0_hat, x0_raw, step)
        return self._clip(mean, "x")

    def _clip(self, value: Tensor, target: str) -> Tensor:
        if self.clip != target:
            return value
        if self.bounds is None:
            return value.clamp(-self.clip_range, self.clip_range)
        low, high = self._bounds_on(value.device)
        return value.clamp(low.to(value.dtype), high.to(value.dtype))

    def _bounds_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What is clipped to, [A] each; copied to a device once."""
        assert self.bounds is not None
        if self.bounds[0].device != device:
            with torch.inference_mode(False):
                self.bounds = (self.bounds[0].to(device), self.bounds[1].to(device))
        return self.bounds


def _widened(demonstrated: tuple[Tensor, Tensor] | None, by: float) -> tuple[Tensor, Tensor] | None:
    if demonstrated is None or by == 1.0:
        return demonstrated
    low, high = demonstrated
    middle, half = (low + high) / 2, (high - low) / 2
    return middle - by * half, middle + by * half


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise [B, H, A]. With a list of generators, row i depends on generator i alone."""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} rows; give one, or one per row")
        generator = list(generator)
    result: Tensor = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    return result
