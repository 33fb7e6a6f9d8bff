"""Combinations of fields that cannot work, though each field is right by itself."""

import json
import re
from collections.abc import Iterator, Sequence

from dora_dist.config.schema import AdapterConfig, DataConfig, EngineConfig, ModelConfig, TrainingConfig


def between_fields(
    model: ModelConfig, adapter: AdapterConfig, data: DataConfig, *, training: TrainingConfig, engine: EngineConfig
) -> Iterator[str]:
    """What is wrong, one line each, naming the fields and the way out."""
    yield from _batches_and_warmup(training)
    yield from _validation(data, training.eval_every)
    yield from _adapter(adapter, model.task)
    yield from _task(model, data, training.metric)
    yield from _fields_of_other_formats(data)
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
    rate = max([training.learning_rate, *training.learning_rates.values()])
    if rate * training.weight_decay >= 1:
        yield (
            f"training.weight_decay = {training.weight_decay:g}: times the learning rate, {rate:g}, it is the share of "
            "each weight that a step takes away, which must be below 1; lower one of the two"
        )


def _validation(data: DataConfig, every: int | None) -> Iterator[str]:
    if data.validation is not None and data.validation_samples:
        yield (
            f"data.validation = {json.dumps(data.validation)} and data.validation_samples = "
            f"{data.validation_samples}: give one of the two; the samples are held out from the training data"
        )
    if every and data.validation is None and not data.validation_samples:
        yield (
            f"training.eval_every = {every}: there is nothing to evaluate on; give data.validation, "
            "or hold records out with data.validation_samples"
        )


FORMATS_OF_TASKS = {
    "sequence_classification": "classification",
    "question_answering": "squad",
    "seq2seq_lm": "summarisation",
    "image_text_to_text": "llava",
}
_TASKS_WITH_HEADS = ("sequence_classification", "question_answering", "image_text_to_text")
"""They train something in full beside adapters, or instead."""


def _task(model: ModelConfig, data: DataConfig, metric: str) -> Iterator[str]:
    task, format = model.task, data.format
    for name, its_format in FORMATS_OF_TASKS.items():
        if (task == name) != (format == its_format):
            yield (
                f'model.task = "{task}" and data.format = "{format}": {name} and the format {its_format} go together'
            )
    if format == "llava" and data.image_folder is None:
        yield 'data.format = "llava": data.image_folder is not set; give the folder that the pictures are in'
    if format == "llava" and data.loss_on != "answer":
        yield (
            f'data.loss_on = "{data.loss_on}": of conversations with pictures only the assistant\'s turns are '
            'learnt; set it to "answer"'
        )
    known = ["loss"]
    if task == "question_answering":
        known += ["f1", "exact_match"]
    elif task == "seq2seq_lm":
        known += ["rouge1", "rouge2", "rougeL"]
    elif task == "sequence_classification" and model.num_labels == 1:
        known += ["pearson", "spearman"]
    elif task == "sequence_classification":
        known += ["accuracy", "matthews", *(["f1"] if model.num_labels == 2 else [])]
    if metric not in known:
        given = f'training.metric = "{metric}": there is none for model.task = "{task}"'
        labels = f" with model.num_labels = {model.num_labels}" if task == "sequence_classification" else ""
        yield f"{given}{labels}; use {', '.join(known)}"
    if task == "seq2seq_lm" and len(data.text_fields) > 1:
        yield f"data.text_fields = {json.dumps(data.text_fields)}: a document is one field; name one"
    if task == "question_answering" and data.doc_stride >= data.cutoff_len // 2:
        yield (
            f"data.doc_stride = {data.doc_stride}: must be below half of data.cutoff_len = "
            f"{data.cutoff_len}, or windows would hardly move on"
        )


_FORMATS_OF_FIELDS = {
    "text_fields": ("classification", "summarisation"),
    "label_field": ("classification", "summarisation"),
    "target_len": ("summarisation",),
    "doc_stride": ("squad",),
    "image_folder": ("llava",),
    "chat_template": ("llava",),
}


def _fields_of_other_formats(data: DataConfig) -> Iterator[str]:
    for name, formats in _FORMATS_OF_FIELDS.items():
        value = getattr(data, name)
        if data.format in formats or value == type(data).model_fields[name].default:
            continue
        if name == "chat_template" and data.format == "messages":
            if value != "model":
                yield f'data.chat_template = "{value}": data.format = "messages" takes the tokenizer\'s; give "model"'
            continue
        yield (
            f'data.{name} = {json.dumps(value)}: has no meaning for data.format = "{data.format}", only for '
            f"{' and '.join(formats)}; take it out, or set data.format"
        )


def _adapter(adapter: AdapterConfig, task: str) -> Iterator[str]:
    targets, magnitude_only = adapter.target_modules, adapter.magnitude_only_modules
    remedy = "set adapter.weight_decomposed to true"
    if not adapter.weight_decomposed and magnitude_only:
        given = f"adapter.magnitude_only_modules = {magnitude_only}"
        yield f"{given}: plain LoRA has no magnitudes; {remedy}, or give []"
    if not adapter.weight_decomposed and adapter.norm_gradient == "full":
        yield f'adapter.norm_gradient = "full": plain LoRA has no norm; {remedy}, or give "detached"'
    yield from _dynamic_rank(adapter)
    in_full = adapter.trained_modules if adapter.trained_modules is not None else task in _TASKS_WITH_HEADS
    if targets == [] and not magnitude_only and not in_full:
        yield "adapter.target_modules = []: nothing to train; name modules, or null for the family's default"
    yield from _bad_patterns("adapter.target_modules", targets or [])
    yield from _bad_patterns("adapter.magnitude_only_modules", magnitude_only)
    yield from _bad_patterns("adapter.trained_modules", adapter.trained_modules or [])
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
    if adapter.start_rank <= adapter.r:
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
