"""The parts of benchmarks/claims.py and benchmarks/first_steps.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "launch"))  # what the demos have in common
