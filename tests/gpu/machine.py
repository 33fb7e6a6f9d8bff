"""Where the checks run: all GPUs that this machine shows, or two ranks on its CPU as a rehearsal of that."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT

DEVICE = "DORA_DIST_TEST_DEVICE"
"""Environment variable: "cuda" (the default), or "cpu" for the rehearsal."""
NOT_A_RESULT = "rehearsal on the CPU, not a GPU result"


@dataclass(frozen=True)
class Machine:
    """`ranks` ranks on "cuda", one for each GPU, or on "cpu"."""

    device: str
    ranks: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def environment(self) -> dict[str, str]:
        """What children see: this checkout, one kind of device, and matrix products that repeat to the last bit."""
        found = {**os.environ, "DS_ACCELERATOR": self.device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        found |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch"), found.get("PYTHONPATH", "")])}
        found |= {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        on_cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # toys are too small for threads
        return found if self.on_gpu else found | on_cpu

    def run(self, *words: object) -> None:
        """Run a command from the repository's root, on this device; AssertionError with its output if it fails."""
        command = [str(word) for word in words]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"

    def launch(self, *words: object) -> None:
        """The same by DeepSpeed's launcher, on every rank: a script and its arguments."""
        ranks = [] if self.on_gpu else ["--num_accelerators", self.ranks]
        self.run("deepspeed", *ranks, "--master_port", free_port(), *words)

    def job(self, file: Path, actions: dict[str, dict[str, Any]], launcher: bool = True) -> dict[str, Any]:
        """Results of `tests.gpu.ranks` by name: of all ranks, or (`launcher` False) of one process alone."""
        file.write_text(json.dumps(actions, default=str))
        if launcher:
            self.launch("--module", "tests.gpu.ranks", file)
        else:
            self.run(sys.executable, "-m", "tests.gpu.ranks", file)
        return json.loads(file.with_suffix(".result.json").read_text())


def this_machine() -> Machine | None:
    """The machine to check; None where there is no GPU to be checked."""
    if os.environ.get(DEVICE, "cuda") == "cpu":
        return Machine("cpu", 2)
    gpus = torch.cuda.device_count()
    return Machine("cuda", gpus) if gpus else None


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def described(machine: Machine) -> dict[str, str]:
    """Device, driver and versions. It opens the GPU, so it comes after the checks."""
    found = {"ranks": str(machine.ranks), "device": f"{os.cpu_count()} CPU cores"}
    if machine.on_gpu:
        ask = [shutil.which("nvidia-smi") or "true", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.partition("\n")[0]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"device": torch.cuda.get_device_name(), "driver": driver}
        found |= {"CUDA": str(torch.version.cuda), "NCCL": nccl}
    return found | {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")}
