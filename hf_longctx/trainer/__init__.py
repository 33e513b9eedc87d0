"""Floor 3, the only floor that knows a Trainer."""
