"""What a model is trained for: records, loss and metrics."""
