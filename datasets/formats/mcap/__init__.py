"""ROS 2's bags in MCAP."""
