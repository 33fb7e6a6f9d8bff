"""Adapters when weights are shards: parameters, optimizer state, norms, components."""
