"""Floor 2: losses that stay exact when the sequence is cut."""
