"""Networks, the diffusion process, the sampler, normalisation and the policy bundle."""
