"""Networks and what surrounds them: plain layers, readable from top to bottom. They know nothing of kernels."""
