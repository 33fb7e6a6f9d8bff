"""Adapters when weights are shards: ZeRO-3's parameters and optimizer state, norms and components over ranks."""
