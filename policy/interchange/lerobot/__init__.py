"""lerobot's diffusion policies, as its 0.4.4 and 0.6.1 keep them in a folder."""

from action_diffusion.policy.interchange.lerobot.form import LEROBOT

__all__ = ["LEROBOT"]
