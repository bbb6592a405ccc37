"""What a denoiser is trained to say, chosen by `policy.objective.name` (`objective=` on the command line)."""
