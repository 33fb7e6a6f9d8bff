"""Combinations of fields that cannot work, though each field is right by itself; those of a task are in tasks/."""

import json
import re
from collections.abc import Iterator, Sequence

from dora_dist.config import schedules
from dora_dist.config.adapter import AdapterConfig
from dora_dist.config.engine import EngineConfig
from dora_dist.config.outputs import AnalysisConfig
from dora_dist.config.schema import DataConfig, ModelConfig, TrainingConfig


def between_fields(
    model: ModelConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    *,
    training: TrainingConfig,
    engine: EngineConfig,
    analysis: AnalysisConfig,
) -> Iterator[str]:
    """What is wrong, one line each, naming the fields and the way out."""
    yield from _batches_and_warmup(training)
    if training.activation_checkpointing == "selective" and adapter.method == "full":
        yield (
            'training.activation_checkpointing = "selective": keeps outputs of layers whose weight is frozen, and '
            'adapter.method = "full" freezes none; set it to true'
        )
    if training.recompute_all and training.activation_checkpointing is not True:
        given = json.dumps(training.activation_checkpointing)
        yield f"training.recompute_all = true: means nothing with activation_checkpointing = {given}; set that to true"
    yield from _validation(data, training)
    yield from _packing(data)
    yield from _streaming(data, training)
    yield from _adapter(adapter)
    yield from _bad_patterns("analysis.modules", analysis.modules)
    flash = model.attn_implementation == "flash_attention_2"
    if flash and (model.dtype == "fp32" or engine.accelerator == "cpu"):
        yield (
            'model.attn_implementation = "flash_attention_2": needs model.dtype = "bf16" and a GPU; '
            'use "sdpa" otherwise'
        )


def _batches_and_warmup(training: TrainingConfig) -> Iterator[str]:
    if training.warmup_steps is not None and training.warmup_ratio is not None:
        given = f"training.warmup_steps = {training.warmup_steps} and warmup_ratio = {training.warmup_ratio}"
        yield f"{given}: give one of the two and leave the other null"
    yield from schedules.conflicts(training.schedule, training.schedule_settings)
    rate = max([training.learning_rate, *training.learning_rates.values()])
    if rate * training.weight_decay >= 1:
        yield (
            f"training.weight_decay = {training.weight_decay:g}: times the learning rate, {rate:g}, it is the share of "
            "each weight that a step takes away, which must be below 1; lower one of the two"
        )


def _streaming(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    buffer, usual = data.shuffle_buffer, type(data).model_fields["shuffle_buffer"].default
    if not data.streaming:
        if buffer != usual:
            yield f"data.shuffle_buffer = {buffer}: means nothing without data.streaming; set that, or take it out"
        return
    given = "data.streaming = true"
    if training.max_steps is None:
        yield f"{given}: nobody knows how many records an epoch has; say with training.max_steps how long the run is"
    if data.packing:
        yield f"{given} and data.packing = true: which records share a row follows from the lengths of all; take one"
    if data.validation_samples:
        yield (
            f"{given} and data.validation_samples = {data.validation_samples}: a stream has nothing to choose them "
            "from; name validation data in data.validation"
        )


def _validation(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    every = training.eval_every
    if data.validation is not None and data.validation_samples:
        yield (
            f"data.validation = {json.dumps(data.validation)} and data.validation_samples = "
            f"{data.validation_samples}: give one of the two; the samples are held out from the training data"
        )
    if training.early_stopping and not every:
        yield (
            f"training.early_stopping = {training.early_stopping}: counts evaluations, and training.eval_every is "
            "null; give the steps between them, or leave it null"
        )
    if training.early_stopping_min_delta and not training.early_stopping:
        yield (
            f"training.early_stopping_min_delta = {training.early_stopping_min_delta:g}: means nothing without "
            "training.early_stopping; give that, or leave it 0"
        )
    if every and data.validation is None and not data.validation_samples:
        yield (
            f"training.eval_every = {every}: there is nothing to evaluate on; give data.validation, "
            "or hold records out with data.validation_samples"
        )


def _packing(data: DataConfig) -> Iterator[str]:
    given = f"data.packing_length = {data.packing_length}"
    if data.packing_length is not None and not data.packing:
        yield f"{given}: rows hold one record each; set data.packing to true, or leave it null"
    elif data.packing_length is not None and data.packing_length < data.longest_text:
        yield (
            f"{given}: a row must have room for the longest record, data.cutoff_len = {data.longest_text}; raise it, "
            "or lower data.cutoff_len"
        )


def _adapter(adapter: AdapterConfig) -> Iterator[str]:
    targets, magnitude_only = adapter.target_modules, adapter.magnitude_only_modules
    remedy = "set adapter.weight_decomposed to true"
    if not adapter.weight_decomposed and magnitude_only:
        given = f"adapter.magnitude_only_modules = {magnitude_only}"
        yield f"{given}: plain LoRA has no magnitudes; {remedy}, or give []"
    if not adapter.weight_decomposed and adapter.norm_gradient == "full":
        yield f'adapter.norm_gradient = "full": plain LoRA has no norm; {remedy}, or give "detached"'
    yield from _dynamic_rank(adapter)
    yield from _bad_patterns("adapter.target_modules", targets or [])
    yield from _bad_patterns("adapter.magnitude_only_modules", magnitude_only)
    yield from _bad_patterns("adapter.trained_modules", adapter.trained_modules or [])
    yield from _bad_patterns("adapter.trained_parameters", adapter.trained_parameters)
    for pattern in sorted(set(targets or []) & set(magnitude_only)):
        yield f'adapter.magnitude_only_modules: "{pattern}" is in adapter.target_modules too; keep one'


def _dynamic_rank(adapter: AdapterConfig) -> Iterator[str]:
    if not adapter.dynamic_rank:
        return
    if adapter.target_modules == []:
        yield "adapter.dynamic_rank = true: adapter.target_modules = [] leaves no layer to prune; set it to false"
    if adapter.prune_start >= adapter.prune_stop:
        yield (
            f"adapter.prune_start = {adapter.prune_start}: must be before adapter.prune_stop = {adapter.prune_stop}, "
            "both as shares of all optimizer steps"
        )
    if adapter.r is None or adapter.start_rank is None:
        yield (
            "adapter.dynamic_rank = true: components are pruned until adapter.r are left on average, and adapter.r is "
            "null; give it (16 is usual), or set adapter.dynamic_rank to false"
        )
    elif adapter.start_rank <= adapter.r:
        yield (
            f"adapter.start_rank_factor = {adapter.start_rank_factor}: layers start with {adapter.start_rank} "
            f"components and adapter.r = {adapter.r} is to be left, so there is nothing to prune; raise the factor "
            "(the paper's is 1.5), or set adapter.dynamic_rank to false"
        )
    if adapter.init_from is not None:
        yield (
            f'adapter.init_from = "{adapter.init_from}": its components have no gates; set adapter.dynamic_rank to '
            "false to train it on"
        )


def _bad_patterns(field: str, patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield (
                f'{field}: "{pattern}" is not a regular expression ({error}); give the ending of module names, '
                r'such as "q_proj", or an expression such as ".*\.q_proj"'
            )
