"""Bodies of the recipes: what `recipes/*.py` run."""
