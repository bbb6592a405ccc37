"""What chunks are worth, and which noise leads to good ones: the networks of learning from reward."""
