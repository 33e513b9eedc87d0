"""Floor 3: sentence-transformers' modules and losses on packed and sharded rows; no Trainer."""
