"""What may change when a run is resumed: a rule for every field of the configuration, and what a checkpoint records
so that the rules can be applied.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.adapters.methods import chosen
from dora_dist.checkpoint.early_stopping import ended_early
from dora_dist.config.fields import values
from dora_dist.config.files import new_run_from
from dora_dist.config.mixture import mixture_of, replaced
from dora_dist.config.names import Sources, data_set, is_local
from dora_dist.data.mixture import SHARES
from dora_dist.data.sampler import SAMPLES, batches_of
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.secrets import without_secrets
from dora_dist.weights.digest import sampled_digest

if TYPE_CHECKING:
    from dora_dist.config import RunConfig, TrainingConfig
    from dora_dist.weights.safetensors_io import TensorFolder


class Rule(Enum):
    """What a change of a field means to a run that is resumed."""

    FOLLOWED = "takes effect from the next step on, and is said"
    CONTENT = "names or selects something: what it comes to is compared instead, and the change is said"
    SHAPE = "refused: what the checkpoint holds has the old value"
    ORDER = "refused: the order of the data would not continue"
    FIRST = "only a run's start reads it: it may be given up, and not be set to something else"
    PLACE = "where this start reads and writes: not compared"


RULES: dict[Rule, dict[str, str]] = {
    Rule.FOLLOWED: {
        "": "plugins",
        "model": "dtype attn_implementation trust_remote_code",
        "adapter": "dropout dropout_mode norm_gradient importance_beta dem_weight dem_form pruned_moments compact",
        "data": "packing packing_length target_len cache features image_folder image_aspect_ratio max_image_pixels "
        "bad_images num_workers",
        "training": "optimizer learning_rate learning_rates schedule schedule_settings warmup_steps warmup_ratio "
        "epochs max_steps micro_batch_size neftune_alpha weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon "
        "activation_checkpointing recompute_all loss_chunk eval_every metric early_stopping "
        "early_stopping_min_delta num_beams",
        "checkpoint": "save_every keep_last on_failure keep_best",
        "engine": "accelerator offload_param offload_optimizer hpz_partition_size param_persistence_threshold "
        "prefetch_bucket_size reduce_bucket_size max_live_parameters max_reuse_distance allgather_sequential "
        "start_timeout_s step_timeout_s deepspeed",
        "logging": "every trackers tensorboard progress_bar report samples sample_tokens peak_flops",
        "analysis": "every modules",
    },
    Rule.CONTENT: {
        "model": "path revision tokenizer",
        # checkpoint/format.py compares what these come to: parameters, their scale, the pruning budget. How components
        # start is over.
        "adapter": "target_modules magnitude_only_modules trained_modules trained_parameters start_rank_factor "
        "prune_start prune_stop prune_every prune_schedule component_init component_scale",
        "data": "train validation validation_samples format text_fields label_field loss_on train_on cutoff_len "
        "bad_records prompt_template answer_field doc_stride prompts chat_template group_by_modality_length",
    },
    Rule.SHAPE: {
        "model": "task num_labels feature_dim storage storage_settings",
        "adapter": "method settings weight_decomposed r lora_alpha use_rslora dynamic_rank",
    },
    Rule.ORDER: {"data": "streaming shuffle_buffer", "training": "global_batch_size seed"},
    Rule.FIRST: {"adapter": "init_from"},
    Rule.PLACE: {"checkpoint": "run_dir resume"},
}
"""Every field of the configuration, by rule and section ("": outside of the sections)."""

_BEST = ("training.metric", "validation data")
"""What the values are of that say which checkpoint is the best."""

PARTS = "training samples of each task"
"""Where a checkpoint says how many samples an epoch has of each kind, if there are several."""

_UNREAD_IN_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def rules() -> dict[str, Rule]:
    """The rule of every field by its name."""
    return {
        f"{section}.{field}".removeprefix("."): rule
        for rule, sections in RULES.items()
        for section, fields in sections.items()
        for field in fields.split()
    }


def located(config: RunConfig) -> RunConfig:
    """The run with absolute paths for what it reads on this machine, and the method's own r where none is given; hub
    names stay names.

    That is what is written down, so that a run can be found, merged and evaluated from another working directory.
    """
    model, adapter, data = config.model, config.adapter, config.data
    places = {
        "path": _absolute(model.path),
        "tokenizer": model.tokenizer and _absolute(model.tokenizer),
    }
    sources = {split: _sources(getattr(data, split), _source) for split in ("train", "validation")}
    features = {"features": _sources(data.features, os.path.abspath)}
    pictures = {"image_folder": data.image_folder and os.path.abspath(data.image_folder)}
    start = {"init_from": adapter.init_from and os.path.abspath(adapter.init_from)}
    rank = {"r": chosen(adapter).settings().get("r") if adapter.r is None else adapter.r}
    return config.model_copy(
        update={
            "model": model.model_copy(update=places),
            "adapter": adapter.model_copy(update=start | rank),
            "data": data.model_copy(update=sources | features | pictures),
        }
    )


def _absolute(name: str) -> str:
    return os.path.abspath(name) if is_local(name) else name


def _sources(names: Sources, place: Callable[[str], str]) -> Any:
    """A field of sources with the `place` of each name."""
    if isinstance(names, Mapping):
        return {task: _sources(of_task, place) for task, of_task in names.items()}
    if mixture_of(names):
        return replaced(names, lambda path: _sources(path, place))
    if names is None or isinstance(names, list):
        return names and [place(name) for name in names]
    return place(names)


def _source(name: str) -> str:
    named = data_set(name)
    return name if named is not None and not named.is_here else os.path.abspath(name)


def record(
    config: RunConfig,
    world_size: int,
    *,
    data: Mapping[str, str],
    order: Mapping[str, Any],
    base: Path,
    tensors: TensorFolder,
) -> dict[str, Any]:
    """What a checkpoint says of the run that writes it; plain JSON.

    `data` are short texts that differ where a data set does (`agreement.of_data`), `order` what the order of the
    training data follows from; `base` is the base's folder, and `tensors` the same. Its weights are known by 3 short
    pieces of each: to read all of them would take minutes.
    """
    described = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return {
        "configuration": json.loads(located(config).to_json()),
        "ranks": world_size,
        "data": dict(data),
        "order": dict(order),
        "base": {
            "weights": sampled_digest(tensors),
            "config": {name: value for name, value in described.items() if name not in _UNREAD_IN_CONFIG},
        },
    }


def check_settings(folder: Path, manifest: Mapping[str, Any], config: RunConfig) -> None:
    """Raise UserError for fields that may not change, all at once. Needs neither data nor base."""
    if not manifest.get("trained_with"):
        raise UserError(
            f"checkpoint.resume: {folder} was not written by `train`: it does not say what it was trained with; "
            f"{new_run_from(folder)}"
        )
    lines = []
    for name, theirs, ours in _changed(manifest, config):
        rule = rules()[name]
        told = f"{folder} was written with {name} = {_shown(theirs)}, this run has {_shown(ours)}"
        if rule is Rule.SHAPE:
            lines.append(f"{told}: what it holds does not fit that; set it back, or start a new run without it")
        elif rule is Rule.ORDER:
            lines.append(f"{told}: the order of the data would not continue; {_or_start_from(folder)}")
        elif rule is Rule.FIRST and ours is not None:
            lines.append(f"{told}: only a new run starts from it; leave it out, or start a new run without resuming")
    if lines:
        raise UserError("checkpoint.resume: " + "\n  ".join(lines))


def changes(folder: Path, manifest: Mapping[str, Any], config: RunConfig, *, ours: Mapping[str, Any]) -> dict[str, str]:
    """What differs from the run that wrote the checkpoint and is followed: `{"training.epochs": "3 -> 4", ...}`.

    `ours` is this run's `record`. Raises UserError where base or training data are others.
    """
    theirs = manifest["trained_with"]
    found = {name: f"{_shown(before)} -> {_shown(now)}" for name, before, now in _changed(manifest, config)}
    if theirs["base"]["weights"] != ours["base"]["weights"]:
        raise UserError(
            f"checkpoint.resume: {folder} was trained on another base: the weights in model.path = "
            f'"{config.model.path}" are not those of "{theirs["configuration"]["model"]["path"]}" then; set model.path '
            "to the base it was trained on"
        )
    for name, (before, now) in _differing(theirs["base"]["config"], ours["base"]["config"]):
        found[f"the base's config.json: {name}"] = f"{_shown(before)} -> {_shown(now)}"
    for name, (before, now) in _differing(theirs["data"], ours["data"]):
        if name == "training data":
            fields = [f"{field} {found[field]}" for field in found if field.startswith(("data.", "model.tok"))]
            why = f" (changed: {', '.join(fields)})" if fields else ", although all fields are the same"
            raise UserError(
                f"checkpoint.resume: {folder} was trained on other records, or the same in another order: {before} "
                f"there, {now} here{why}; {_or_start_from(folder)}"
            )
        found[name] = f"{before or 'none'} -> {now or 'none'}"
    for name, (before, now) in _differing(_order(theirs), _order(ours)):
        raise UserError(
            f"checkpoint.resume: {folder} was written with {name} = {_shown(before)}, this run has {_shown(now)}: the "
            f"order of the data would not continue; {_or_start_from(folder)}"
        )
    if theirs["ranks"] != ours["ranks"]:
        found["ranks"] = f"{theirs['ranks']} -> {ours['ranks']}"
    return found


def told(changed: Mapping[str, str], *, streamed: bool) -> Iterator[str]:
    """A line for each change. streamed: only the first training records have been compared."""
    same_data = not streamed and "validation data" not in changed
    for name, change in changed.items():
        same = rules().get(name) is Rule.CONTENT and (same_data or not name.startswith(("data.", "model.tokenizer")))
        yield f"{name} {change} ({'comes to the same' if same else 'followed'})"
    if forgets_best(changed):
        yield "earlier values do not count for which checkpoint is the best"


def forgets_best(changed: Mapping[str, str]) -> bool:
    """Whether earlier values of the metric cannot be compared with those to come."""
    return any(name in changed for name in _BEST)


def optimizer_steps(training: TrainingConfig, parts: Mapping[str, int]) -> int:
    """Optimizer steps of a whole run, as the Trainer counts them.

    parts: the training samples of each kind, no two of which share a batch (`RaggedDataset.parts`).
    """
    batches = batches_of(parts.values(), training.global_batch_size)
    return training.max_steps or math.ceil(training.epochs * batches)


def finished(folder: Path, manifest: Mapping[str, Any], config: RunConfig) -> str | None:
    """That a checkpoint is at the end of this run, or beyond, and how to train on; None if steps are left."""
    step, order = manifest["step"], manifest["trained_with"]["order"]
    parts = order.get(PARTS) or {"": order[SAMPLES] or 0}
    steps = optimizer_steps(config.training, parts)
    if step < steps:
        return _ended_early(folder, manifest, config.training)
    by_steps = config.training.max_steps is not None
    field, value = ("max_steps", steps) if by_steps else ("epochs", config.training.epochs)
    pruned = "components" in manifest and not manifest["compacted"]
    how = f"give a larger training.{field}: --training.{field} {2 * max(step, steps) if by_steps else f'{2 * value:g}'}"
    if pruned:  # its pruning window is a share of all steps
        how = new_run_from(folder)
    return (
        f"the run is finished: {folder} is at step {step} of {steps} (training.{field} = {value:g}), and nothing is "
        f"left to train; to train on, {how}"
    )


def _ended_early(folder: Path, manifest: Mapping[str, Any], training: TrainingConfig) -> str | None:
    """As `finished`, of a run with steps left. Values of another metric say nothing."""
    theirs = manifest["trained_with"]["configuration"]["training"]
    if theirs["metric"] != training.metric or (why := ended_early(folder, manifest, training)) is None:
        return None
    return (
        f"the run is finished: {folder} is at step {manifest['step']}, where it ended early: {why}; to train on, give "
        "a larger training.early_stopping, or null"
    )


def _changed(manifest: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Name, value there, and value here, of every field that differs. A field that was not known then is left out."""
    theirs = values(manifest["trained_with"]["configuration"], type(config))
    ours = values(json.loads(located(config).to_json()), type(config))
    for name, rule in rules().items():
        before, now = theirs.get(name, ours[name]), ours[name]
        if before != now and rule is not Rule.PLACE:
            yield name, before, now


def _order(trained_with: Mapping[str, Any]) -> dict[str, Any]:
    """What the order follows from; of a mixture's sources by position, as they were once written by name."""
    order = dict(trained_with["order"])
    if isinstance(by_name := order.get(SHARES), Mapping):
        order[SHARES] = list(by_name.values())
    return order


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in dict.fromkeys([*theirs, *ours]):
        if theirs.get(name) != ours.get(name):
            yield name, (theirs.get(name), ours.get(name))


def _or_start_from(folder: Path) -> str:
    return f"set it back, or {new_run_from(folder)}"


def _shown(value: Any) -> str:
    text = json.dumps(without_secrets(value), ensure_ascii=False)  # the page shows it, too
    return text if len(text) <= 80 else f"{text[:77]}..."
