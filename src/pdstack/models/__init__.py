"""Models: what a directory must hold, how weights are read, and how the built-in models are made."""
