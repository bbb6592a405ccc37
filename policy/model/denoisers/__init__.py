"""Networks that shape noise into a chunk, step by step: U-Net, transformer, DiT."""
