"""What the parts of a parameter's optimizer state are called, here and in checkpoints; known without the engine."""

MASTER = "master"
"""The fp32 copy that the optimizer steps."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square."""
