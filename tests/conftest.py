"""What every test shares: the repository root and the commands on their paths, and no network."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # spawned ranks inherit it, installed package or not
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # deepspeed, dora-dist
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("DS_ACCELERATOR", "cpu")
