"""Running a bundle in real time."""
