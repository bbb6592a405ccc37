"""Words as a policy takes them: frozen encoders, and what is asked of them."""
