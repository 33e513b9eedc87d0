"""Floor 3: callbacks that report on a run without touching its numbers."""
