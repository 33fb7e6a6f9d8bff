"""Small but real LLaVAs: towers and language models of transformers, a trained tokenizer, pictures, conversations."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests import toy

SIDE, PATCH = 28, 14
TOWERS = {
    "clip": "CLIPVisionConfig",
    "siglip": "SiglipVisionConfig",
    "dinov2": "Dinov2Config",
}
TOWER_SIZES: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 26,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def tower(folder: Path, kind: str = "clip") -> Path:
    """A folder of a vision tower with random weights."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, TOWERS[kind])(**TOWER_SIZES)
    model: Any = transformers.AutoModel.from_config(config)
    model.save_pretrained(folder)
    return folder


def language_model(folder: Path, **config: Any) -> Path:
    """A LLaMA folder whose tokenizer knows the words of the conversations."""
    return toy.base_model(folder, **config)


def model(folder: Path, kind: str = "clip", **options: Any) -> Path:
    """A LLaVA folder, assembled; `options` as of `assemble_llava`."""
    from dora_dist.models.llava.assemble import assemble_llava

    parts = folder.with_name(f"{folder.name}-parts")
    assemble_llava(tower(parts / "tower", kind), language_model(parts / "language"), folder, **options)
    return folder


def pictures(folder: Path, count: int = 8) -> list[str]:
    """Pictures of one colour in different shapes; names relative to the folder."""
    (folder / "a").mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        colour = list(COLOURS)[i % len(COLOURS)]
        names.append(f"a/{i}-{colour}.{'png' if i % 2 else 'jpg'}")
        Image.new("RGB", (20 + 9 * i, 40), COLOURS[colour]).save(folder / names[-1])
    return names


def conversations(names: list[str], text_only: int = 4) -> list[dict[str, Any]]:
    """One record for each picture, one with two pictures, and some without any."""
    records: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        colour = name.rpartition("-")[2].partition(".")[0]
        question = "<image>\nis it " + "very " * (i % 3) + "red?"
        turns = [("human", question), ("gpt", f"the answer is {colour}")]
        if i % 4 == 3:
            turns += [("human", "and now?"), ("gpt", "true")]
        records.append({"id": f"p{i}", "image": name, "conversations": turns})
    two = [("human", "first <image> then <image> which?"), ("gpt", "false")]
    records.append({"id": "two", "image": names[:2], "conversations": two})
    for i in range(text_only):
        turns = [("human", f"is {i} even?" + " please answer" * i), ("gpt", "true" if i % 2 == 0 else "false")]
        records.append({"id": f"t{i}", "conversations": turns})
    for record in records:
        record["conversations"] = [{"from": who, "value": text} for who, text in record["conversations"]]
    return records


def write(folder: Path, count: int = 8, text_only: int = 4) -> Path:
    """A data file `folder`/data.json with its pictures in `folder`/pictures."""
    names = pictures(folder / "pictures", count)
    (folder / "data.json").write_text(json.dumps(conversations(names, text_only)))
    return folder / "data.json"
