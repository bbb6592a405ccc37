"""The diffusion process, the sampler with its hooks, and real-time chunking."""
