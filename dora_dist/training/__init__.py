"""A run from top to bottom, and what it prints."""
