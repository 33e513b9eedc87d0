"""Attention layers that compute scores themselves instead of calling transformers' attention interface."""
