"""Adapters on shards: parameters, optimizer state, norms, components."""
