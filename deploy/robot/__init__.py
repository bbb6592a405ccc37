"""What a robot is for the loop, the one that is made of processes, and the cell it stands in."""
