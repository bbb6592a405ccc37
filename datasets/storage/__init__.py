"""The replay buffer and how it lies on disk."""
