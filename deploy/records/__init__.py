"""What a run leaves behind, and the same run once more from it."""
