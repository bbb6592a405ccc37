"""LeRobot's data sets, v2 and v3."""
