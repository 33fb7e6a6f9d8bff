"""pydantic's findings as text that a user can act on: field, value, what is right, what was meant."""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dora_dist.config.fields import FieldSpec, field_specs
from dora_dist.config.section import ABSURD
from dora_dist.runtime.errors import UserError

# Names of the same things elsewhere, too far from ours for a comparison of letters.
OTHER_NAMES = {
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler_kwargs": "training.schedule_settings",
    "neftune_noise_alpha": "training.neftune_alpha",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.micro_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "train_batch_size": "training.global_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "gradient_checkpointing": "training.activation_checkpointing",
    "eval_steps": "training.eval_every",
    "save_steps": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep_last",
    "output_dir": "checkpoint.run_dir",
    "logging_steps": "logging.every",
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "use_dora": "adapter.weight_decomposed",
    "train_on_inputs": "data.loss_on",
    "max_length": "data.cutoff_len",
    "max_seq_length": "data.cutoff_len",
    "zero_optimization": "engine.deepspeed",
}


FileOf = Callable[[tuple[str, ...]], Path | None]


def explain(error: ValidationError, schema: type[BaseModel], origin: str, *, file_of: FileOf) -> UserError:
    """One UserError over all findings, each on a line of its own.

    `file_of` tells the file that the value under some keys is from; named where it is not `origin`, but one that is
    extended.
    """
    specs = field_specs(schema)
    lines: dict[str, str] = {}  # a union reports each of its alternatives; one line per field is enough
    for finding in error.errors(include_url=False):
        path = [str(part) for part in finding["loc"]]
        name = next((outer for outer in path[:1] if outer in specs), ".".join(path[:2]))
        if finding["type"] == "value_error":
            lines[finding["msg"]] = finding["msg"].removeprefix("Value error, ")
        elif finding["type"] == "extra_forbidden":
            lines[name] = f"{name}: unknown key{suggestion(name, specs)}"
        elif finding["type"] == ABSURD:
            key = "".join(f', "{inside}"' for inside in path[2:])
            value = finding["input"]
            given = _shown(value) if isinstance(value, dict) else f"{value:.15g}"
            lines[f"{name}{key}"] = f"{name}{key} = {given}: {finding['msg']}"
        elif name in specs:
            lines.setdefault(name, _wrong_value(specs[name], finding))
        else:
            shape = f"must be a section {{...}} with {', '.join(_keys(name, specs))}"
            lines[name] = f"{name}: {'missing' if finding['type'] == 'missing' else _shown(finding['input'])}; {shape}"
    found = "\n".join(lines.values()).splitlines()
    return listed([f"{line}{_elsewhere(line, origin, file_of)}" for line in found], origin)


def _elsewhere(line: str, origin: str, file_of: FileOf) -> str:
    """` (in FILE)` where the field that a problem begins with has its value from another file than `origin`."""
    name = re.match(r'[\w.]+(, "[^"]+")?', line)
    keys = re.split(r'\.|, "', name[0].rstrip('"')) if name else []
    file = file_of(tuple(keys))
    return "" if file is None or file == Path(origin) else f" (in {file})"


def listed(problems: Sequence[str], origin: str) -> UserError:
    """One UserError over all `problems`, each on a line of its own; `origin` is the file that they are in."""
    title = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return UserError(f"{origin}: {title}\n" + "\n".join(f"  {line}" for line in problems))


def suggestion(name: str, specs: dict[str, FieldSpec]) -> str:
    """`; did you mean X?` for an unknown `name`, or what there is instead."""
    section, _, key = name.rpartition(".")
    sections = list(dict.fromkeys(known.partition(".")[0] for known in specs if "." in known))
    known_keys = {known.rpartition(".")[2]: known for known in specs}
    if meant := known_keys.get(key) or OTHER_NAMES.get(key):
        return f"; did you mean {meant}?"
    if section not in sections:
        outside = [known for known in specs if "." not in known]
        close = difflib.get_close_matches(section or key, [*sections, *outside], 1)
        if not close:
            return f"; the sections are {', '.join(sections)}"
        return f"; did you mean {close[0] if close[0] in outside else f'the section {close[0]}'}?"

    def likeness(known: str) -> float:
        there, _, other = known.rpartition(".")
        return difflib.SequenceMatcher(None, key, other).ratio() + (0.1 if there == section else 0)

    best = max(specs, key=likeness)
    if likeness(best) > 0.7:
        return f"; did you mean {best}?"
    return f"; {section} has {', '.join(_keys(section, specs))}"


def _keys(section: str, specs: dict[str, FieldSpec]) -> list[str]:
    return [name.partition(".")[2] for name in specs if name.startswith(f"{section}.")]


def _wrong_value(spec: FieldSpec, finding: Any) -> str:
    wanted = f"must be {spec.expected()} ({spec.description})"
    if finding["type"] == "missing":
        return f"{spec.name}: missing; {wanted}"
    value = finding["input"]
    meant = spec.parse(value) if isinstance(value, str) else value
    hint = f"; write {json.dumps(meant)}, without quotes" if meant != value and not isinstance(meant, list) else ""
    return f"{spec.name} = {_shown(value)}: {wanted}{hint}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
