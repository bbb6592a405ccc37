"""From observations to one embedding: cameras, states, depth, words and series."""
