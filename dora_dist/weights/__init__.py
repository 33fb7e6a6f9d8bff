"""Bytes of weights: safetensors by range, names, loading, placement."""
