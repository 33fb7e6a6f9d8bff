"""LLaVA: a vision tower and a projector in front of a language model."""
