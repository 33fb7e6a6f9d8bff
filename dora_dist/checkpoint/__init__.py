"""What a run leaves on disk: run folders, checkpoints of any world size, merging an adapter into its base."""
