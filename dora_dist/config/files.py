"""Are the files and folders of a run there? Asked before any process group exists, so no rank has to wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.config.names import DATA_SUFFIXES, PACKED, TABLES, data_set, is_local
from dora_dist.config.pictures import how_to_get
from dora_dist.config.source import nearby
from dora_dist.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config.schema import RunConfig


_MADE = "`make demo` creates the quickstart's, `dora-dist import-gguf` one of a GGUF file"
_MADE_BY = {"image_text_to_text": "`dora-dist assemble-llava` makes one, `dora-dist consolidate` one of a trained run"}


def check(config: RunConfig) -> None:
    """Raise one UserError over everything that is missing. Hub names are not looked up."""
    if problems := [*_model(config), *_data(config), *_pictures(config), *_starting_points(config), *_run_dir(config)]:
        title = f"{len(problems)} problems with files\n  " if len(problems) > 1 else ""
        raise UserError(title + "\n  ".join(problems))


def _model(config: RunConfig) -> Iterator[str]:
    name = config.model.path
    folder = Path(name)
    label = f'model.path = "{name}"'
    if not is_local(name):
        pass
    elif folder.suffix == ".gguf":
        yield f"{label}: convert it with `dora-dist import-gguf {name} --output FOLDER` and give that folder"
    elif not folder.exists():
        yield (
            f"{label}: no such folder in {Path.cwd()}{nearby(folder)}; give a Hugging Face model folder or "
            f"a hub name ({_MADE_BY.get(config.model.task, _MADE)})"
        )
    elif not (folder / "config.json").is_file():
        yield f"{label}: no config.json in it; give a folder with config.json and .safetensors files"
    elif not any(folder.glob("*.safetensors")):
        yield (
            f"{label}: no .safetensors file in it; weights in other formats are not read: load the model "
            "with transformers and save it with save_pretrained()"
        )
    tokenizer = config.model.tokenizer
    if tokenizer is not None and is_local(tokenizer) and not Path(tokenizer).exists():
        yield (
            f'model.tokenizer = "{tokenizer}": no such file or folder{nearby(Path(tokenizer))}; give a '
            "folder, a hub name or a sentencepiece tokenizer.model, or null for the model's own"
        )


def _data(config: RunConfig) -> Iterator[str]:
    named = [("data.train", name) for name in _listed(config.data.train)]
    named += [("data.validation", name) for name in _listed(config.data.validation)]
    for field, name in named:
        path = Path(name)
        label = f'{field} = "{name}"'
        if (data := data_set(name)) is not None:
            if data.is_here and not data.looks_whole():
                missing = data.file or f"{', '.join(DATA_SUFFIXES)} file"
                yield f"{label}: no {missing} in that folder; give a data file, or the folder of a data set"
        elif problem := not_a_data_file(path):
            yield f"{label}: {problem}"


def not_a_data_file(path: Path) -> str | None:
    """Why no records can be read from a file, and what to do about it; None if they can, as far as its name tells."""
    give = f"give {', '.join(DATA_SUFFIXES)}"
    if not path.exists():
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which leads to no file; give the file itself"
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        return f"no such file{where}{nearby(path)}; give a data file or a hub name"
    if path.is_dir():
        return "is a folder; give a data file, or name the folder without that ending"
    if path.suffix in PACKED:
        return f"is packed; unpack it, and {give}"
    if path.suffix in TABLES:
        return f"unknown kind of file; {give} (pandas reads tables, and writes .jsonl with DataFrame.to_json)"
    if path.suffix not in DATA_SUFFIXES:
        return f"unknown kind of file; {give}"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    return "the file is empty" if path.stat().st_size == 0 else None


def _pictures(config: RunConfig) -> Iterator[str]:
    folder = config.data.image_folder
    if folder is not None and not Path(folder).is_dir():
        missing = f'data.image_folder = "{folder}": no such folder in {Path.cwd()}{nearby(Path(folder))}'
        yield missing + how_to_get(folder, _listed(config.data.train))


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []


def _starting_points(config: RunConfig) -> Iterator[str]:
    start = config.adapter.init_from
    if start is not None and not (Path(start) / "adapter_config.json").is_file():
        inside = Path(start) / "adapter" / "adapter_config.json"
        hint = f'; did you mean "{inside.parent}"?' if inside.is_file() else nearby(Path(start))
        yield f'adapter.init_from = "{start}": no adapter_config.json in it; give a PEFT adapter folder{hint}'
    resume = config.checkpoint.resume
    if resume not in (None, "auto") and not (Path(resume) / "manifest.json").is_file():
        yield (
            f'checkpoint.resume = "{resume}": no complete checkpoint (no manifest.json in it)'
            f'{nearby(Path(resume))}; give a folder RUN_DIR/checkpoint-STEP, or "auto" for the newest'
        )


def _run_dir(config: RunConfig) -> Iterator[str]:
    folder = Path(config.checkpoint.run_dir)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    label = f'checkpoint.run_dir = "{folder}"'
    if not existing.is_dir():
        yield f"{label}: {existing} is a file; give another folder"
    elif not os.access(existing, os.W_OK):
        yield f"{label}: no permission to write in {existing}; give another folder"
