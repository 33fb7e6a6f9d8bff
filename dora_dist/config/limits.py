"""Numbers that no run comes near: a slip of the hand, refused before it overflows an int64 or asks for memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_dist.config.schema import RunConfig

_STEPS = 10**9
_RECORDS = 2**20
_ELEMENTS = 2**50
_SECONDS = 10**8
_MOST: dict[str, float] = {
    "model.num_labels": _RECORDS,
    "adapter.r": 2**16,
    "adapter.lora_alpha": 10**6,
    "adapter.start_rank_factor": 1000,
    "adapter.prune_every": _STEPS,
    "adapter.dem_weight": 1e60,
    "data.validation_samples": 10**12,
    "data.cutoff_len": 2**30,
    "data.target_len": 2**30,
    "data.doc_stride": 2**30,
    "data.num_workers": 1024,
    "training.learning_rate": 1e30,
    "training.warmup_steps": _STEPS,
    "training.epochs": 10**6,
    "training.max_steps": _STEPS,
    "training.global_batch_size": _RECORDS,
    "training.micro_batch_size": _RECORDS,
    "training.weight_decay": 1000,
    "training.max_grad_norm": 1e30,
    "training.adam_epsilon": 1,
    "training.eval_every": _STEPS,
    "training.num_beams": 1024,
    "checkpoint.save_every": _STEPS,
    "checkpoint.keep_last": _STEPS,
    "engine.hpz_partition_size": _RECORDS,
    "engine.param_persistence_threshold": _ELEMENTS,
    "engine.prefetch_bucket_size": _ELEMENTS,
    "engine.reduce_bucket_size": _ELEMENTS,
    "engine.max_live_parameters": _ELEMENTS,
    "engine.max_reuse_distance": _ELEMENTS,
    "engine.start_timeout_s": _SECONDS,
    "engine.step_timeout_s": _SECONDS,
    "logging.every": _STEPS,
    "logging.peak_flops": 1e24,
}


def absurd(config: RunConfig) -> Iterator[str]:
    """A line for each number above the most that can be meant."""
    for name, most in _MOST.items():
        section, _, key = name.partition(".")
        yield from _above(name, getattr(getattr(config, section), key), most)
    for pattern, rate in config.training.learning_rates.items():
        yield from _above(f'training.learning_rates, "{pattern}"', rate, _MOST["training.learning_rate"])


def _above(name: str, value: float | None, most: float) -> Iterator[str]:
    if value is not None and value > most:
        yield f"{name} = {value:.15g}: is more than any run needs; give at most {most:,.15g}"
