"""robosuite's tasks, as robomimic uses them."""
