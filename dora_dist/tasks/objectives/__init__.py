"""What each task minimises and measures: how samples become batches, batches a loss, and a set of records metrics."""
