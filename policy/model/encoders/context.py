"""What is not observed and stays for an episode, told from how things went: a wind, a payload, a drifted actuator.

    steps [B, To, D] ─┬─▶ the last `recent`, one after the other ────────────▶ [B, recent · D + size]
                      └─▶ GRU, oldest step first ─▶ linear, layer norm ─▶ z ──┘

z [B, size] is the context. Nothing but the policy's loss trains it: it is what of the history helps to say the action.
"Ada-Diffuser: Latent-Aware Adaptive Diffusion for Decision-Making" (2025) infers such a latent by a variational model
of the observations to come; here it is deterministic, and one network. Where a disturbance acts on what was commanded,
the last command must be among the observations.
"""

from __future__ import annotations

from torch import Tensor, cat, nn

from action_diffusion.errors import InputError


class Context(nn.Module):
    """size: of the context. recent: steps that the policy sees as they are, besides. hidden: of the GRU.

    step_dim (D), n_obs_steps (To): of the encoder. Raises `InputError` where `recent` is not from 1 to To.
    """

    def __init__(self, *, step_dim: int, n_obs_steps: int, size: int = 16, recent: int = 2, hidden: int = 64):
        super().__init__()
        if not 1 <= recent <= n_obs_steps:
            raise InputError(
                f"encoder.context.recent={recent}: expected 1 to {n_obs_steps}, the steps that are observed "
                "(task.n_obs_steps)"
            )
        if min(size, hidden) < 1:
            raise InputError(f"encoder.context: size={size} and hidden={hidden} must be at least 1")
        self.recent = recent
        self.gru = nn.GRU(step_dim, hidden, batch_first=True)
        self.out = nn.Sequential(nn.Linear(hidden, size), nn.LayerNorm(size))
        self.output_dim = recent * step_dim + size

    def forward(self, steps: Tensor) -> Tensor:
        """[B, To, D], oldest first → [B, recent · D + size]."""
        _, last = self.gru(steps)
        return cat([steps[:, -self.recent :].flatten(1), self.out(last[0])], dim=1)
