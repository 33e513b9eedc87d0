"""Floor 1, torch only: who am I, and how do tensors move."""
