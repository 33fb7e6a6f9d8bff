"""Makes the files, with the code of the checkout that this is run in (see the package's docstring)."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dora_dist import cli
from dora_dist.config import RunConfig
from tests import encoders, llava, toy
from tests.before import cases
from tests.conftest import ROOT
from tests.ranks import run_ranks

SMALL = {"hidden_size": 24, "intermediate_size": 35, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGURED = ("config.json", "deepspeed.json", "run.json", "metrics.jsonl")


def main() -> None:
    """Train, keep what is to be kept, and write down what this code makes of it."""
    shutil.rmtree(cases.PLACE, ignore_errors=True)
    inputs(cases.PLACE)
    names = [name for name in cases.CASES if name != "compacted"]  # a later checkpoint of the dynamic run
    whole = [cases.configuration(name, cases.PLACE, cases.PLACE / "whole" / name) for name in names]
    losses = dict(zip(names, run_ranks(cases.train, 2, *whole)[0], strict=True))
    for name, case in cases.CASES.items():
        keep(cases.PLACE / "whole" / ("dynamic" if name == "compacted" else name), cases.PLACE / name, case.step)
    shutil.rmtree(cases.KEPT, ignore_errors=True)
    shutil.copytree(cases.PLACE, cases.KEPT, ignore=shutil.ignore_patterns("whole"))
    again = [cases.resumed(name, cases.PLACE, cases.PLACE / name) for name in cases.CASES]
    expected: dict[str, Any] = {"arithmetic": run_ranks(cases.arithmetic, 2, cases.PLACE)[0]}
    expected["merged"] = {n: cases.merged(n, cases.PLACE, cases.PLACE / "merged" / n) for n in cases.CASES}
    expected["evaluated"] = {n: cases.evaluated(n, cases.PLACE, cases.PLACE / f"{n}.json") for n in cases.CASES}
    started = cases.started(cases.PLACE, cases.PLACE / "started")
    ended = run_ranks(cases.train, 2, *again, started)[0]
    expected["losses"] = dict(zip([*cases.CASES, "started"], ended, strict=True))
    for name in names:
        assert expected["losses"][name] == losses[name], f"{name}: resuming is not what an uninterrupted run does"
    recipes()
    cases.EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


def inputs(place: Path) -> None:
    """Base models in bf16, and data."""
    bases, data, parts = place / "bases", place / "data", place / "parts"
    data.mkdir(parents=True)
    toy.base_model(bases / "llama", torch.bfloat16, **SMALL, num_hidden_layers=2)
    halved(encoders.plain_encoder(bases / "bert"))
    toy.base_model(parts / "language", torch.bfloat16, **SMALL, num_hidden_layers=1)
    halved(llava.tower(parts / "tower"))
    words = ["--vision", str(parts / "tower"), "--language", str(parts / "language"), "--output", str(bases / "llava")]
    assert cli.main(["assemble-llava", *words]) == 0
    shutil.rmtree(parts)
    toy.write_records(data / "records.json", 25)
    encoders.write_labelled(data / "labelled.json", 25)
    names = llava.pictures(data / "pictures", 6)
    (data / "conversations.json").write_text(json.dumps(llava.conversations(names, 4)))
    captions = [{"id": i, "image": name, "captions": [f"the answer is {i}"]} for i, name in enumerate(names)]
    (data / "captions.json").write_text(json.dumps(captions))


def halved(folder: Path) -> Path:
    """The weights of a folder in bf16."""
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def keep(run_dir: Path, kept: Path, step: int) -> None:
    """Copy a run folder as it was when one of its checkpoints had been written; what machines say of it is left out."""
    kept.mkdir(parents=True)
    for name in CONFIGURED:
        shutil.copy(run_dir / name, kept / name)
    lines = (kept / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (kept / "metrics.jsonl").write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= step))
    shutil.copytree(run_dir / f"checkpoint-{step}", kept / f"checkpoint-{step}")


def recipes() -> None:
    """The files of configs/, and every default of this code: together what it understands each of them as."""
    shutil.copytree(ROOT / "configs", cases.KEPT / "configs")
    defaults = json.loads(RunConfig.from_dict(cases.NOTHING_SAID).to_json())
    (cases.KEPT / "defaults.json").write_text(json.dumps(defaults, indent=1) + "\n")
    for file in (cases.KEPT / "configs").iterdir():
        understood = json.loads(RunConfig.load(file).to_json())
        assert understood == cases.with_defaults(file, defaults), file.name


if __name__ == "__main__":
    main()
