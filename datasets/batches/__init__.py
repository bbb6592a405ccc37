"""From a buffer to batches: sources, columns, windows, and where the arrays lie."""
