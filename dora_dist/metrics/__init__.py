"""Scores of predictions, thin over libraries."""
