"""What acts while a chunk is made: one file each, on `Hook`, fitted to a policy and stored in its bundle."""
