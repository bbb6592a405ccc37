"""What an arm and a camera are, what limits and obstacles are, and how a command is laid out. No process, no policy."""
