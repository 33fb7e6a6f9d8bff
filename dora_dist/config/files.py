"""Are the files and folders of a run there? Asked before any process group exists, so no rank has to wait."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dora_dist.config.adapter import AdapterConfig
from dora_dist.config.names import (
    DATA_KINDS,
    DATA_SUFFIXES,
    OWN_ADAPTER,
    PACKED,
    PEFT_ADAPTER,
    SHEETS,
    data_set,
    is_local,
    listed,
)
from dora_dist.config.outputs import CheckpointConfig
from dora_dist.config.pictures import how_to_get
from dora_dist.config.schema import DataConfig, ModelConfig
from dora_dist.config.source import absence, nearby
from dora_dist.runtime.errors import UserError

_HOW_TO_MAKE_ONE = (
    "`make demo` creates the quickstart's; `dora-dist import-gguf` makes one of a GGUF file, `assemble-llava` one that "
    "reads pictures, `consolidate` one of a trained run"
)


def check(model: ModelConfig, adapter: AdapterConfig, data: DataConfig, *, checkpoint: CheckpointConfig) -> None:
    """Raise one UserError over everything that is missing. Hub names are not looked up."""
    problems = [
        *_model(model),
        *_data(data),
        *_pictures(data),
        *_features(data),
        *_init_from(adapter.init_from),
        *_resume(checkpoint.resume),
        *_run_dir(Path(checkpoint.run_dir)),
    ]
    if problems:
        title = f"{len(problems)} problems with files\n  " if len(problems) > 1 else ""
        raise UserError(title + "\n  ".join(problems))


def _model(model: ModelConfig) -> Iterator[str]:
    name = model.path
    folder = Path(name)
    label = f'model.path = "{name}"'
    if not is_local(name):
        pass
    elif folder.suffix == ".gguf":
        yield f"{label}: convert it with `dora-dist import-gguf {name} --output FOLDER` and give that folder"
    elif not folder.exists():
        what = absence(folder, "folder")
        where = f" in {Path.cwd()}{nearby(folder)}" if what == "no such folder" else ""
        yield (f"{label}: {what}{where}; give a Hugging Face model folder or a hub name ({_HOW_TO_MAKE_ONE})")
    elif not folder.is_dir():
        yield f'{label}: is a file; give the folder that it is in, "{folder.parent}"'
    elif not (folder / "config.json").is_file():
        yield f"{label}: no config.json in it; give a folder with config.json and .safetensors files"
    elif not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
        yield (
            f"{label}: no .safetensors file in it; weights in other formats are not read: load the model "
            "with transformers and save it with save_pretrained()"
        )
    tokenizer = model.tokenizer
    if tokenizer is not None and is_local(tokenizer) and not Path(tokenizer).exists():
        yield (
            f'model.tokenizer = "{tokenizer}": no such file or folder{nearby(Path(tokenizer))}; give a '
            "folder, a hub name or a sentencepiece tokenizer.model, or null for the model's own"
        )


def _data(data: DataConfig) -> Iterator[str]:
    named = [("data.train", name) for name in listed(data.train)]
    named += [("data.validation", name) for name in listed(data.validation)]
    for field, name in named:
        path = Path(name)
        label = f'{field} = "{name}"'
        if (named_set := data_set(name)) is not None:
            if named_set.is_here and not named_set.looks_whole():
                missing = named_set.file or f"{DATA_KINDS} file"
                yield f"{label}: no {missing} in that folder; give a data file, or the folder of a data set"
        elif problem := not_a_data_file(path):
            yield f"{label}: {problem}"


def not_a_data_file(path: Path) -> str | None:
    """Why no records can be read from a file, and what to do about it; None if they can, as far as its name tells."""
    give = f"give {DATA_KINDS}"
    if not path.exists():
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which leads to no file; give the file itself"
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        return f"no such file{where}{nearby(path)}; give a data file or a hub name"
    if path.is_dir():
        return "is a folder; give a data file, or name the folder without that ending"
    if path.suffix in SHEETS:
        return f"unknown kind of file; {give} (pandas reads tables, and writes .jsonl with DataFrame.to_json)"
    if path.suffix in PACKED and not path.name.endswith(DATA_SUFFIXES):
        return f"is packed; unpack it, and {give}"
    if not path.name.endswith(DATA_SUFFIXES):
        return f"unknown kind of file; {give}"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    return "the file is empty" if path.stat().st_size == 0 else None


def _pictures(data: DataConfig) -> Iterator[str]:
    folder = data.image_folder
    if folder is not None and not Path(folder).is_dir():
        missing = f'data.image_folder = "{folder}": no such folder in {Path.cwd()}{nearby(Path(folder))}'
        yield missing + how_to_get(folder, listed(data.train))


def _features(data: DataConfig) -> Iterator[str]:
    for name in dict.fromkeys(listed(data.features)):
        if not Path(name).exists():
            yield (
                f'data.features = "{name}": no such file or folder{nearby(Path(name))}; give an HDF5 file, a '
                "folder of .h5 or a folder of .npz files (`dora-dist extract-features` makes them)"
            )


def new_run_from(checkpoint: Path) -> str:
    """How a new run starts from what a checkpoint has learnt; one of full fine-tuning has no adapter."""
    if _is_adapter(checkpoint / "adapter"):
        return f"start a new run from its adapter with --adapter.init_from {checkpoint / 'adapter'}"
    return (
        f"start a new run from the whole model: merge it (`dora-dist consolidate {checkpoint} --output FOLDER`) and "
        "give --model.path FOLDER"
    )


def _init_from(start: str | None) -> Iterator[str]:
    if start is None or _is_adapter(Path(start)):
        return
    inside = Path(start) / "adapter"
    if (Path(start) / "manifest.json").is_file() and not inside.is_dir():
        yield f'adapter.init_from = "{start}": a checkpoint without an adapter; {new_run_from(Path(start))}'
    else:
        hint = f'; did you mean "{inside}"?' if _is_adapter(inside) else nearby(Path(start))
        missing = f"no {PEFT_ADAPTER} or {OWN_ADAPTER} in it"
        yield f'adapter.init_from = "{start}": {missing}; give an adapter folder{hint}'


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (PEFT_ADAPTER, OWN_ADAPTER))


def _resume(resume: str | None) -> Iterator[str]:
    """What checkpoint.resume names, where it is not a checkpoint; a run folder with checkpoints will do."""
    if resume is None or resume == "auto" or (Path(resume) / "manifest.json").is_file():
        return
    folder = Path(resume)
    label = f'checkpoint.resume = "{folder}"'
    if _is_adapter(folder):
        inside = f", or {folder.parent} to go on with it" if (folder.parent / "manifest.json").is_file() else ""
        yield (
            f"{label}: is an adapter without the optimizer's state; give it to adapter.init_from, to start a new run "
            f"from it{inside}"
        )
    elif not any(folder.glob("checkpoint-*/manifest.json")):
        yield (
            f"{label}: no complete checkpoint (no manifest.json in it){nearby(folder)}; give a folder "
            'RUN_DIR/checkpoint-STEP, or "auto" for the newest'
        )


def _run_dir(folder: Path) -> Iterator[str]:
    label = f'checkpoint.run_dir = "{folder}"'
    try:
        places = (folder, *folder.absolute().parents)
        existing = next(place for place in places if place.is_symlink() or place.exists())
        if not existing.exists():
            yield f"{label}: {existing} is a link to {existing.readlink()}, where nothing can be found; give a folder"
        elif not existing.is_dir():
            yield f"{label}: {existing} is a file; give another folder"
        else:
            with tempfile.TemporaryFile(dir=existing):  # permissions alone do not say it: /proc, read-only mounts
                pass
            yield from _not_a_run(folder, label)
    except (OSError, ValueError) as error:  # also a name that is too long, or has a character that none may have
        reason = error.strerror if isinstance(error, OSError) else str(error)
        yield f"{label}: nothing can be written there ({reason}); give another folder"


def _not_a_run(folder: Path, label: str) -> Iterator[str]:
    """What a folder holds that is not a run, and that a run's files would be mixed with, or replace."""
    if (folder / "manifest.json").is_file():
        yield f"{label}: is a checkpoint; give its run folder, {folder.absolute().parent}, or another one"
    elif _is_adapter(folder):
        yield f"{label}: holds an adapter; give a folder of the run's own"
    elif any(folder.glob("*.safetensors")):
        yield f"{label}: holds a model; give a folder of the run's own"
    elif (folder / "config.json").exists() and not (folder / "deepspeed.json").exists():
        yield f"{label}: holds a config.json that no run wrote and this one would replace; give a folder of its own"
