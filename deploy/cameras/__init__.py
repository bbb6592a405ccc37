"""A camera's process, and observations of one instant from sources with times of their own."""
