"""PushT: the simulator, its block, and a scripted expert."""
