"""How the processes of a run talk: shared-memory rings, the processes themselves, and what is said in the rings."""
