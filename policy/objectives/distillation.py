"""A policy of one step that says what another, its teacher, makes of the same noise in several ("Knowledge Distillation
in Iterative Generative Models", Luhman and Luhman 2021).

    x* = what the teacher's sampler makes of z,  z ~ N(0, 1)
    x̂0(z, s)  →  x*,  s the sampler's first and noisiest step

Demonstrations that differ where the observation is the same have a mean that none of them is, and a step that learns
from them says that. x* is a function of the noise and the observation: there is nothing to take the mean of. So the
teacher's sampler must not draw noise in its steps: two regressions (`scheduler=mip`), a flow, DDIM with eta=0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.objectives.objective import Network, Objective, Pair, Teacher


@dataclass(kw_only=True, eq=False)
class Distillation(Objective):
    """teacher: its bundle, which training reads and nobody else; the network begins with its weights."""

    teacher: str | None = None

    taught: ClassVar[bool] = True

    def check_teacher(self, theirs: Sampler, own: Sampler) -> None:
        if any(move.draws for move in theirs.solver.moves):
            raise InputError(
                f"policy.objective.teacher draws noise in its steps ({theirs.scheduler}), and distillation needs one "
                "that draws none: scheduler=mip, scheduler=flow, or scheduler=ddim policy.sampler.eta=0"
            )
        if theirs.steps[0] != own.steps[0]:
            raise InputError(
                f"policy.objective.teacher begins at a noise of {theirs.steps[0].b:.3f}, and this policy at "
                f"{own.steps[0].b:.3f}: distillation needs samplers that begin alike (sampler.timestep_spacing)"
            )

    def pairs(
        self,
        network: Network,
        process: Process,
        x0: Tensor,
        generator: torch.Generator | None,
        teacher: Teacher | None = None,
    ) -> Iterator[Pair]:
        """Of x0 only the shape is taken. Raises `InputError` without a teacher."""
        if teacher is None:
            raise InputError("policy.objective: distillation needs a teacher: policy.objective.teacher=DIR/bundle")
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)

        def said(by: Network, x: Tensor, step: Step) -> Tensor:
            return by(x, torch.full((len(x),), step.time, device=x.device))

        sampler = teacher.sampler
        with torch.no_grad():
            chunk, _ = sampler.run(lambda x, step, rows: said(teacher.network, x, step), noise)
        begin, first = sampler.solver.start * noise, sampler.steps[0]
        yield Pair(process.x0_from_output(said(network, begin, first), begin, first), chunk)
