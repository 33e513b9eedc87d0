"""Proof that a stranger can repeat: a model shared by several processes against the same model in one."""
