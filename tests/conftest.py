"""What every test shares: the repository root on the path, and no network."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # spawned ranks inherit it, installed package or not
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("DS_ACCELERATOR", "cpu")
