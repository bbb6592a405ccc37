"""The teleoperation page."""
