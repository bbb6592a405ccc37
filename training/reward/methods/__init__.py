"""Ways to learn from reward, a file each, on `training.reward.method.Method`."""
