"""Floor 2, the science: attention functions, on torch and transformers' registries alone."""
