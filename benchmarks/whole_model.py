"""A model of full size on this machine: load, train, save and merge it, with the memory of each; see `--help`.

The weights are random, written once and kept; the commands are those that a user types.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from stepbench.memory import run_measured
from stepbench.settings import default_ranks

from dora_dist.checkpoint import run_folder

ROOT = Path(__file__).resolve().parents[1]
WORDS = 3000
LLAMA_7B = {"hidden": 4096, "ffn": 11008, "layers": 32, "heads": 32, "vocab": 32000}
SHARD_BYTES = 512 * 2**20


def main() -> None:
    options, passed = parse()
    base, folder = options.base, options.output
    if not (base / "model.safetensors.index.json").exists():
        write_model(base, options)
    folder.mkdir(parents=True, exist_ok=True)
    run, merged = folder / "run", folder / "merged"
    for old in (run, merged):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "data.json").write_text(json.dumps(records(options)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    trained = run_measured(training(options, passed), folder / "train.log", env=environment)
    merging = ["dora-dist", "consolidate", run, "--output", merged, *options.merge]
    result = {
        "model": {name: getattr(options, name) for name in LLAMA_7B},
        "ranks": options.ranks,
        "overrides": passed,
        "base_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "train": {**trained, **logged(run)},
        "merge": run_measured(merging, folder / "merge.log", env=environment),
    }
    (folder / "whole_model.json").write_text(json.dumps(result, indent=1))
    print(text(result))
    print(f"written: {folder / 'whole_model.json'}; merged model: {merged}")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Loads, trains, saves and merges a whole model (LLaMA-7B by default) with random weights; prints "
        "seconds, and peak memory over all processes (PSS). Other options are the config file's, and passed on: "
        "--model.storage nf4"
    )
    for name, default in {**LLAMA_7B, "ranks": default_ranks(), "steps": 3, "tokens": 96}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "llama7b_dora.json", help="the recipe")
    parser.add_argument("--base", type=Path, default=Path("runs/whole-model/base"), help="made once, then reused")
    parser.add_argument("--output", type=Path, default=Path("runs/whole-model"), help="run, merged model and JSON")
    parser.add_argument(
        "--merge", nargs="+", default=[], metavar="WORD", help="further words for `dora-dist consolidate`"
    )
    return parser.parse_known_args()


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """A LLaMA's folder with random bf16 weights, one tensor in memory at a time; the index comes last.

    In vocabulary each number is a word, so any text of numbers has as many tokens as words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from dora_dist.models.build import skeleton
    from dora_dist.models.heads import CAUSAL_LM
    from dora_dist.weights.safetensors_io import TensorWriter

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    names = ["<unk>", "<s>", "</s>", *(str(number) for number in range(options.vocab - 3))]
    words = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)

    shapes = {name: tuple(p.shape) for name, p in skeleton(folder, CAUSAL_LM).named_parameters()}
    generator, index = torch.Generator().manual_seed(0), {}
    for number, shard in enumerate(shards(shapes), start=1):
        file = f"model-{number:05d}.safetensors"
        layout = [(name, torch.bfloat16, shapes[name]) for name in shard]
        with TensorWriter(folder / file, layout, {"format": "pt"}) as writer:
            for name in shard:
                values = torch.empty(shapes[name], dtype=torch.bfloat16)
                writer.write(
                    name, values.fill_(1.0) if values.dim() == 1 else values.normal_(0, 0.02, generator=generator)
                )
                index[name] = file
        print(f"{file}: {len(shard)} tensors", file=sys.stderr)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1))


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names of the tensors of each file, in the model's order, of about SHARD_BYTES each."""
    files: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if files[-1] and held + nbytes > SHARD_BYTES:
            files.append([])
            held = 0
        files[-1].append(name)
        held += nbytes
    return files


def records(options: argparse.Namespace) -> list[dict[str, str]]:
    """A batch for every step and rank; each record fills `tokens`."""
    numbers = random.Random(0)
    words = min(WORDS, options.vocab - 3)

    def some() -> str:
        return " ".join(str(numbers.randrange(words)) for _ in range(options.tokens))

    return [
        {"instruction": some(), "input": "", "output": some(), "answer": ""}
        for _ in range(max(options.steps, 2) * options.ranks)
    ]


def training(options: argparse.Namespace, passed: list[str]) -> list[str | Path]:
    """The command that trains; what the user passes on comes last and wins."""
    fields = {
        "model.path": options.base,
        "data.train": options.output / "data.json",
        "data.validation_samples": 0,
        "data.cutoff_len": options.tokens,
        "training.eval_every": "null",
        "training.max_steps": options.steps,
        "training.warmup_steps": 0,
        "training.micro_batch_size": 1,
        "training.global_batch_size": options.ranks,
        "logging.every": 1,
        "checkpoint.save_every": options.steps,
        "checkpoint.keep_best": "false",
        "checkpoint.run_dir": options.output / "run",
    }
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    command = ["deepspeed", "--num_accelerators", str(options.ranks), ROOT / "launch" / "train.py"]
    return [*command, "--config", options.config, *words, *passed]


def logged(run: Path) -> dict[str, Any]:
    """The losses and seconds of the steps, and of the save, as the run wrote them."""
    lines = run_folder.metrics(run)
    steps = [line["seconds_per_step"] for line in lines if "loss" in line and "seconds_per_step" in line]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "step_seconds": steps,
        "save_seconds": [line["save_seconds"] for line in lines if "save_seconds" in line],
    }


def text(result: dict[str, Any]) -> str:
    train, merge = result["train"], result["merge"]
    step = f"{statistics.median(train['step_seconds']):.1f} s" if train["step_seconds"] else "not logged"
    overrides = " ".join(result["overrides"]) or "none"
    return (
        f"base {result['base_bytes'] / 1e9:.2f} GB, {result['ranks']} ranks; overrides: {overrides}\n"
        f"load, train, save: {train['seconds']:.0f} s, a step {step} (median), peak {train['peak_bytes'] / 1e9:.2f} GB "
        f"over all processes\nmerge: {merge['seconds']:.0f} s, peak {merge['peak_bytes'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
