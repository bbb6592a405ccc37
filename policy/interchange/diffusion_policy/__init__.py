"""diffusion_policy's checkpoints: Chi et al. 2023, github.com/real-stanford/diffusion_policy."""

from action_diffusion.policy.interchange.diffusion_policy.form import DIFFUSION_POLICY

__all__ = ["DIFFUSION_POLICY"]
