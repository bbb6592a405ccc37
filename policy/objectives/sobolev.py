"""Feedback that is demonstrated with its gains: the policy learns how its action moves with the observation, too.

A demonstrator such as LQR or DDP knows beside each action u the gains K = ∂u/∂s. A demonstration (s, u) then says what
those next to it are, (s + v, u + K v), and what the network says of the first action that is executed must move alike:

    loss = E |û − u|² + weight · E |∂û[v] − ∂u[v]|²,   v random, as long as the observations are spread

û is the network's output and u its target (`Process.target`) at one time and one noise for all neighbours, so that the
noisy chunk moves as the clean one does; then a chunk that is denoised in many steps has the gains K as well. Both
derivatives are differences between two neighbours, at s + v and s − v, which any denoiser can: "Sobolev Training for
Neural Networks" (Czarnecki et al. 2017) for the gains of a demonstrator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.objectives.objective import Denoising, Learner, Network, Pair


@dataclass(kw_only=True, eq=False)
class Sobolev(Denoising):
    """gain: the buffer's column of K [A, D], of the row's action and observations: D values of all states, in the order
    of the policy's observations, in the data's units. weight: of the derivatives beside the actions.
    """

    gain: str = "gain"
    weight: float = 1.0

    STEP: ClassVar[float] = 0.05
    """How far away neighbours are, of the observations' spread: little beside it, much beside float32's rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.weight < float("inf"):
            raise InputError(f"policy.objective.weight={self.weight} must be above 0")

    def check_cameras(self, cameras: Sequence[str]) -> None:
        if cameras:
            raise InputError(
                f"policy.objective: sobolev is for states, and the policy sees {', '.join(cameras)}: how pictures move "
                "with what the gains are of is not known"
            )

    def further_loss(
        self,
        policy: Learner,
        obs: Mapping[str, Tensor],
        action: Tensor,
        beside: Mapping[str, Any],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Of the slopes, in float32, since these are differences between neighbours. Raises `InputError` without
        gains."""
        gain = beside.get("gain")
        if gain is None:
            raise InputError("policy.objective: sobolev learns from gains, and none are given")
        spec, process = policy.spec, policy.process
        with torch.autocast(action.device.type, enabled=False):
            states = [key for key in spec.observations if key in spec.states]
            network, x0 = policy.shown(*self.neighbours(obs, states, action, gain, generator), generator)
            slopes = self.slopes(network, process, x0, spec.n_obs_steps - 1, generator)
            return self.weight * self.reduced([slopes], process, None, len(x0))

    def neighbours(
        self,
        obs: Mapping[str, Tensor],
        states: Iterable[str],
        action: Tensor,
        gain: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Demonstrations at s + v, and then those at s − v: observations, key → [2B, To, …], and chunks [2B, H, A].

        obs: key → [B, To, …], of which v moves the `states` now. action [B, H, A], gain [B, A, D], or as one vector;
        data's units. Raises `InputError` for gains of another size.
        """
        now = {key: obs[key][:, -1].float().flatten(1) for key in states}
        all_now = torch.cat(list(now.values()), dim=1)
        (b, d), a = all_now.shape, action.shape[2]
        if gain.numel() != b * a * d:
            raise InputError(
                f"policy.objective.gain: gains of shape {list(gain.shape[1:])}, expected [{a}, {d}]: {a} actions by "
                f"the {d} values of {', '.join(now)}"
            )
        spread = all_now.std(dim=0, correction=0)
        v = torch.randn(all_now.shape, generator=generator, device=action.device) * spread * self.STEP / d**0.5
        moved = (gain.view(b, a, d) @ v.unsqueeze(-1)).squeeze(-1)
        shifts = dict(zip(now, v.split([value.shape[1] for value in now.values()], dim=1), strict=True))
        beside = {key: torch.cat([value, value]) for key, value in obs.items()}
        for key, shift in shifts.items():
            change = torch.cat([shift, -shift]).view(2 * b, *obs[key].shape[2:])
            last = beside[key][:, -1:].float() + change.unsqueeze(1)
            beside[key] = torch.cat([beside[key][:, :-1].float(), last], dim=1)
        step = torch.arange(action.shape[1], device=action.device) == next(iter(obs.values())).shape[1] - 1
        change = torch.cat([moved, -moved]).unsqueeze(1) * step.view(1, -1, 1)
        return beside, torch.cat([action, action]) + change

    def slopes(
        self, network: Network, process: Process, x0: Tensor, now: int, generator: torch.Generator | None
    ) -> Pair:
        """How output and target at the step `now` move with the observation, [B, 1, A]; x0 [2B, H, A] of
        `neighbours`."""
        n = len(x0) // 2
        times = process.draw_times(n, generator=generator, device=x0.device).repeat(2)
        eps = torch.randn(x0[:n].shape, generator=generator, device=x0.device, dtype=x0.dtype).repeat(2, 1, 1)
        output = network(process.add_noise(x0, eps, times), times)
        return Pair(*(self._slope(values[:, now : now + 1]) for values in (output, process.target(x0, eps, times))))

    def _slope(self, values: Tensor) -> Tensor:
        after, before = values.float().chunk(2)
        return (after - before) / (2 * self.STEP)
