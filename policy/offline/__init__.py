"""Learning from recorded rewards: the objective `diffusion_ql`, and the critics that learn beside the policy."""
