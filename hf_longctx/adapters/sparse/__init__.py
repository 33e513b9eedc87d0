"""Sparse attention layers and their indexers, on rows that ranks share, on packed documents, and in training."""
