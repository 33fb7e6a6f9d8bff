"""The model card (README.md) of an adapter folder or a merged one: what it is, how it was made, how to load it.

Nothing of where things lie on this machine goes into it. A card is of use, and never worth a save: what goes wrong with
it is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dora_dist.adapters import native_format, peft_config
from dora_dist.adapters.adapter_folder import AdapterFolder
from dora_dist.adapters.storage import PLAIN
from dora_dist.checkpoint import run_folder
from dora_dist.config.mixture import checked
from dora_dist.config.names import data_set, is_local, listed
from dora_dist.runtime.console import warn

CARD = "README.md"
OURS = "<!-- Made by dora_dist, which replaces this file while this line is in it. -->"
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "summarization",
    "SEQ_CLS": "text-classification",
    "QUESTION_ANS": "question-answering",
}
_PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
}
_SECTIONS = {
    "model": ("task", "dtype", "storage"),
    "data": ("format", "prompt_template", "chat_template", "loss_on", "cutoff_len"),
    "adapter": None,
    "training": None,
}
"""Of the run's configuration, what a card shows: fields by section, None: all."""
_PACKAGES = ("dora_dist", "torch", "transformers", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a card tells. base: folder or hub name; storage: how it was held in training. method: in words. run: the
    configuration of the run; step and results: its optimizer step and what its last evaluation found.
    """

    base: str
    revision: str | None = None
    storage: str = PLAIN.name
    method: str = ""
    task_type: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    results: Mapping[str, float] = field(default_factory=dict)


def about_adapter(adapter: AdapterFolder) -> About:
    """Of an adapter's folder, and of the run that it lies in."""
    checkpoint = adapter.path.parent if adapter.path.name == run_folder.ADAPTER else adapter.path
    try:
        state = json.loads((checkpoint / run_folder.TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = {}
    run = run_folder.config_of(adapter.path)
    return About(
        base=adapter.base_model,
        revision=adapter.revision,
        storage=adapter.base_storage(),
        task_type=adapter.task_type,
        run=run,
        **progress(state),
    )


def of_packed_base(storage: str) -> str | None:
    """What who loads an adapter with PEFT, or serves it, should know of the base's `storage`; None of the plain one."""
    if storage == PLAIN.name:
        return None
    return (
        f"The base was held as {storage.split()[0]} in training. PEFT, and servers that read its folders, take the "
        "base as it is, without that rounding: what they compute differs from training by it. `dora-dist consolidate` "
        "merges the adapter into the weights that training saw."
    )


def progress(trainer_state: Mapping[str, Any]) -> dict[str, Any]:
    """step and results of an `About`, from a trainer's state."""
    logged = [record for record in trainer_state.get("log_history", []) if any(_is_result(name) for name in record)]
    found = {name.removeprefix("eval_"): value for name, value in (logged[-1:] or [{}])[0].items() if _is_result(name)}
    return {"step": trainer_state.get("global_step"), "results": found}


def _is_result(name: str) -> bool:
    speed = ("runtime", "_per_second", "seconds", "samples")
    return name.startswith("eval_") and not name.endswith(speed)


def add_card(folder: Path, about: About, *, replaced: Path | None = None) -> None:
    """Write the card of a folder that is complete but for it. A card of the user's own in the folder that is `replaced`
    is kept; what goes wrong is a warning.
    """
    try:
        for place in (folder, replaced):
            if place is not None and (place / CARD).is_file():
                theirs = (place / CARD).read_text(encoding="utf-8")
                if OURS not in theirs:
                    (folder / CARD).write_text(theirs, encoding="utf-8")
                    return
        (folder / CARD).write_text(_card(folder, about, title=(replaced or folder).name), encoding="utf-8")
    except Exception as error:  # whatever it is, the weights are there
        warn(f"{folder / CARD}: no model card was written ({type(error).__name__}: {error}); the rest is whole")


def _card(folder: Path, about: About, *, title: str) -> str:
    from huggingface_hub import ModelCardData

    adapter = _read(folder / peft_config.CONFIG_NAME)
    native, config = (folder / native_format.CONFIG_NAME).is_file(), _read(folder / "config.json")
    merged = not adapter and not native
    data = ModelCardData(
        base_model=_hub_name(about.base),
        base_model_relation="finetune" if merged else "adapter",
        datasets=sorted({name for name in _sources(about.run) if not is_local(name)}) or None,
        library_name="transformers" if merged else "dora_dist" if native else "peft",
        pipeline_tag=_PIPELINES.get(about.task_type or ""),
        tags=["dora_dist", *(["dora"] if adapter.get("use_dora") else ["lora"] if adapter else [])],
    )
    kind = "A model" if merged else "An adapter"
    parts = [
        f"---\n{data.to_yaml()}\n---\n{OURS}",
        f"# {title}",
        f"{kind} fine-tuned from {_base(about)}{f' with {about.method}' if about.method else ''} by dora_dist.",
        *_trained(about),
        f"## How to load\n\n{_loading(adapter, native, config, about)}",
        *([packed] if adapter and (packed := of_packed_base(about.storage)) else []),
        f"## Versions\n\n{_versions()}",
    ]
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _hub_name(base: str) -> str | None:
    return None if not base or is_local(base) else base


def _shown(name: str) -> str:
    """A model's or a file's name without the folder that it lies in here."""
    return name if not is_local(name) else Path(name).name or "a folder"


def _base(about: About) -> str:
    held = f", held as {about.storage.split()[0]} in training" if about.storage != PLAIN.name else ""
    revision = f" at {about.revision}" if about.revision else ""
    return f"`{_shown(about.base)}`{revision}{held}" if about.base else "a base model"


def _sources(run: Mapping[str, Any]) -> Iterator[str]:
    """The hub names of the training data, and the names of files."""
    for name in listed(checked(run.get("data", {}).get("train"))):
        found = data_set(name)
        yield found.repository if found is not None else name


def _trained(about: About) -> Iterator[str]:
    """The data, the settings and the results of the run, where it is known."""
    if sources := list(dict.fromkeys(map(_shown, _sources(about.run)))):
        step = f", for {about.step:,} optimizer steps" if about.step else ""
        yield f"## Training\n\nTrained on {', '.join(f'`{name}`' for name in sources)}{step}."
    if rows := list(_settings(about.run)):
        yield "\n".join(["| setting | value |", "|---|---|", *(f"| `{name}` | `{value}` |" for name, value in rows)])
    if about.results:
        rows_of_results = [f"| {name} | {value:.4g} |" for name, value in about.results.items()]
        yield "\n".join(["## Results", "", "| on validation data | |", "|---|---|", *rows_of_results])


def _settings(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for section, names in _SECTIONS.items():
        for name, value in run.get(section, {}).items():
            if (names is None or name in names) and value not in (None, [], {}):
                yield f"{section}.{name}", json.dumps(_without_places(value)).replace("|", "\\|").replace("`", "'")


def _without_places(value: Any) -> Any:
    """A setting without folders of this machine."""
    if isinstance(value, str):
        return Path(value).name if value.startswith(("/", "~", ".")) and "/" in value else value
    if isinstance(value, list):
        return [_without_places(part) for part in value]
    return {name: _without_places(part) for name, part in value.items()} if isinstance(value, dict) else value


def _loading(adapter: Mapping[str, Any], native: bool, config: Mapping[str, Any], about: About) -> str:
    place = '"."  # this folder, or its name on the hub'
    base = f'"{_shown(about.base)}"' if about.base else '"BASE"'
    if native:
        return (
            "PEFT has no format for this adapter; dora_dist reads it:\n\n```sh\n"
            "dora-dist chat . --base BASE\ndora-dist consolidate . --base BASE --output merged/\n```"
        )
    if name := _PEFT_CLASSES.get(str(adapter.get("task_type"))):
        return _python(f"from peft import {name}\n\nmodel = {name}.from_pretrained({place.partition('  ')[0]})")
    if adapter:
        return _python(
            "from peft import PeftModel\nfrom transformers import AutoModel\n\n"
            f'base = AutoModel.from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, ".")'
        )
    import transformers

    [first] = [*config.get("architectures", []), "AutoModel"][:1]
    name = first if hasattr(transformers, first) else "AutoModel"
    return _python(
        f"from transformers import AutoTokenizer, {name}\n\npath = {place}\n"
        f'model = {name}.from_pretrained(path, dtype="auto")\ntokenizer = AutoTokenizer.from_pretrained(path)'
    )


def _python(program: str) -> str:
    return f"```python\n{program}\n```"


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
