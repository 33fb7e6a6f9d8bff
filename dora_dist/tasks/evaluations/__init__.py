"""What `evaluate` asks a model of each task, how the answers are found, and what is said of them."""
