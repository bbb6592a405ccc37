"""A policy of one or a few steps that learns from another, its teacher: "Consistency Policy" (Prasad et al. 2024).

The teacher is a policy trained by flow matching (`scheduler=flow`). Its flow takes x_s to x_m in small steps; the
network is to go all the way from s to r in one, as the teacher does from s to m, and itself from m to r:

    x_r* = x_m + (m − r) · u⁻(x_m, m, r),  x_m = Heun(teacher, x_s, s → m),  s ≥ m ≥ r
    u(x_s, s, r)  →  (x_r* − x_s) / (s − r)

which is the objective of consistency trajectory models (Kim et al. 2024), without a gradient through u⁻. Times are
multiples of 1 / bins, as the paper has 80 of them; m is anywhere between, so that much of a way is the teacher's own,
from the first training step on. The rest of the examples are learnt from data, as the teacher did.

The paper's teacher is an EDM, and its student compares clean chunks. Here the teacher is a flow, which passes through
the same noisy chunks up to their scale, and the student compares mean velocities, which `flow_maps` samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Flow, Process
from action_diffusion.policy.objectives.flow_maps import Examples, TwoTimes
from action_diffusion.policy.objectives.objective import Network, Pair, Teacher


@dataclass(kw_only=True, eq=False)
class Consistency(TwoTimes):
    """teacher: its bundle, which training reads and nobody else; the network begins with its weights. bins: see above.
    solver_steps: of the teacher from s to m, two evaluations each."""

    distilled: float = 0.5
    teacher: str | None = None
    bins: int = 80
    solver_steps: int = 4

    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 2:
            raise InputError(f"policy.objective.bins={self.bins} must be at least 2")
        if self.solver_steps < 1:
            raise InputError(f"policy.objective.solver_steps={self.solver_steps} must be at least 1")

    def pairs(
        self,
        network: Network,
        process: Process,
        x0: Tensor,
        generator: torch.Generator | None,
        teacher: Teacher | None = None,
    ) -> Iterator[Pair]:
        """teacher: its denoiser is told one time [R]. Raises `InputError` without one."""
        if teacher is None:
            raise InputError("policy.objective: consistency learns from a teacher: policy.objective.teacher=DIR/bundle")
        return super().pairs(network, process, x0, generator, teacher)

    def _taught(self, of: Examples) -> tuple[Tensor, Pair]:
        assert of.teacher is not None
        s, m, r = self._times(len(of.rows), of.generator, of.x0.device)
        x = of.at(s)
        with torch.no_grad():
            middle = self._solve(of.teacher, x, s, m, of.rows)
            rest = of.velocity(middle, m, r)
            end = middle + (m - r).view(-1, 1, 1) * rest
            target = (end - x) / (s - r).view(-1, 1, 1)
        return s, Pair(of.velocity(x, s, r), target, of.rows)

    def _times(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """s > r and s > m ≥ r, multiples of 1 / bins, [n] each."""
        draw = torch.rand(3, n, generator=generator, device=device)
        s = 1 + (draw[0] * self.bins).floor()
        r = (draw[1] * s).floor()
        m = r + (draw[2] * (s - r)).floor()
        return s / self.bins, m / self.bins, r / self.bins

    def _solve(self, flow: Network, x: Tensor, s: Tensor, m: Tensor, rows: Tensor) -> Tensor:
        """x_m [R, H, A] by the teacher's flow, in steps of Heun's."""
        size = (s - m) / self.solver_steps
        for step in range(self.solver_steps):
            now = s - step * size
            first = flow(x, Flow.TIME_SCALE * now, rows)
            ahead = x + size.view(-1, 1, 1) * first
            second = flow(ahead, Flow.TIME_SCALE * (now - size), rows)
            x = x + size.view(-1, 1, 1) * (first + second) / 2
        return x
