"""How late arm, cameras and policy are, from a slow motion of the arm."""
