"""robomimic's and robosuite's HDF5, to a replay buffer and back."""
