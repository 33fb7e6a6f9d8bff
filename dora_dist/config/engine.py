"""The engine's section, and the DeepSpeed JSON: from this section, the training section and the user's own options."""

import copy
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from dora_dist.config.schema import BatchPlan, TrainingConfig
from dora_dist.config.section import Count, Elements, Seconds, Section, at_most
from dora_dist.runtime.errors import UserError


class EngineConfig(Section):
    """How DeepSpeed ZeRO-3 holds and moves the parameters."""

    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device; auto: a GPU where there is one"
    )
    offload_param: Literal["none", "cpu"] = Field(
        default="none", description="cpu: parameter shards rest in host memory"
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        default="none", description="cpu: AdamW's state and step on the host"
    )
    hpz_partition_size: Count = Field(
        default=1,
        description="Ranks (of one node) that share a second copy of the shards for backward; 1: off",
    )
    param_persistence_threshold: Elements = Field(
        default=100_000, description="Parameters with fewer elements stay whole on every rank"
    )
    prefetch_bucket_size: Elements = Field(default=50_000_000, description="Elements to gather ahead of their use")
    # Not DeepSpeed's 5e8: the bucket is allocated whole (1 to 2 GB), and only adapter gradients use it.
    reduce_bucket_size: Annotated[int, Field(ge=1), at_most(2**50)] = Field(
        default=50_000_000, description="Gradient elements to reduce at a time"
    )
    max_live_parameters: Elements = Field(
        default=1_000_000_000, description="Most elements that stay gathered at a time"
    )
    max_reuse_distance: Elements = Field(
        default=1_000_000_000,
        description="Keep a parameter gathered if it is used again within this many elements",
    )
    allgather_sequential: bool = Field(
        default=False,
        description="Gather parameter by parameter, without a bucket: fewer copies, lower peak memory",
    )
    start_timeout_s: Seconds = Field(
        default=1800.0,
        description="Longest wait for other ranks up to the first step, and while a checkpoint is written, seconds",
    )
    step_timeout_s: Seconds = Field(
        default=600.0, description="Longest wait for other ranks after the first step, seconds"
    )
    deepspeed: dict[str, Any] = Field(
        default={}, description="Further DeepSpeed options, merged into the derived DeepSpeed JSON"
    )


# DeepSpeed options that other fields decide, by dotted name: the field to use instead.
_DECIDED_BY = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer, learning_rate, weight_decay, adam_beta1, adam_beta2 and adam_epsilon",
    "scheduler": "training.schedule, warmup_steps and warmup_ratio",
    "bf16.enabled": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": 'model.dtype, "bf16" or "fp32"',
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "training.activation_checkpointing",
    "zero_allow_untested_optimizer": "nothing: it is always true",
    "zero_optimization.stage": "nothing: it is always 3",
    "zero_optimization.offload_param.device": "engine.offload_param",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "engine.offload_param",
    "zero_optimization.zero_hpz_partition_size": "engine.hpz_partition_size",
    "zero_optimization.reduce_bucket_size": "engine.reduce_bucket_size",
    **{  # DeepSpeed reads these with and without their prefix
        f"zero_optimization.{prefix}{name}": f"engine.{name}"
        for prefix in ("stage3_", "")
        for name in (
            "param_persistence_threshold",
            "prefetch_bucket_size",
            "max_live_parameters",
            "max_reuse_distance",
            "allgather_sequential",
        )
    },
}
_KERNELS_READ_FP16 = "its CUDA kernels read fp16, and model.dtype is bf16 or fp32"
_MASTERS_ARE_FP32 = "masters and Adam's moments are fp32, which updates of bf16 weights need and checkpoints hold"
_OWN_ORDER = "the order of the data is this project's own, which a resume at another world size relies on"
# DeepSpeed options that cannot be right here, by dotted name: the value that means "off", and why.
_IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "zero_optimization.zero_quantized_weights": (
        False,
        "norms, checkpoints and the merge come from the exact weights, not from the rounded ones that products would "
        "see",
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _KERNELS_READ_FP16),
    "zero_optimization.zero_quantized_gradients": (False, _KERNELS_READ_FP16),
    "zero_optimization.zeropp_loco_param": (None, _KERNELS_READ_FP16),
    "zero_optimization.mics_shard_size": (-1, "each rank reads a shard of its own; use engine.hpz_partition_size"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "only DeepSpeed's own CPU optimizer can split a step"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it needs DeepSpeed's own CPU optimizer"),
    "zero_optimization.zenflow": (None, "it needs DeepSpeed's own CPU optimizer"),
    "zero_optimization.legacy_stage1": (False, "the stage is always 3"),
    **{
        f"zero_optimization.{prefix}module_granularity_threshold": (
            0,
            "models of transformers return objects, which DeepSpeed's hooks on coarse modules do not see",
        )
        for prefix in ("stage3_", "")
    },
    "bf16.bf16_master_weights_and_grads": (False, _MASTERS_ARE_FP32),
    "bf16.bf16_optimizer_states": (False, _MASTERS_ARE_FP32),
    "prescale_gradients": (False, "ZeRO-3 does not support it"),
    "gradient_predivide_factor": (1.0, "ZeRO-3 does not support it"),
    "amp": (None, "use model.dtype"),
    "elasticity": (None, "use training.global_batch_size; a run resumes on any number of ranks"),
    "data_efficiency": (None, _OWN_ORDER),
    "curriculum_learning": (None, _OWN_ORDER),
    "progressive_layer_drop": (None, "models of transformers do not take its argument"),
    "compression_training": (None, "it replaces the layers that the adapters are in"),
    "tensor_parallel": (None, "it splits the layers that the adapters are in"),
    "expert_parallel": (None, "it replaces the layers that the adapters are in"),
    "hybrid_engine": (None, "it replaces the layers that the adapters are in"),
    "sequence_parallel_size": (None, "sequences are not split; every rank has whole ones"),
}
# Sections of DeepSpeed's JSON that we write into: something else in their place cannot be merged.
_SECTIONS = (
    "bf16",
    "data_types",
    "zero_optimization",
    "zero_optimization.offload_param",
    "zero_optimization.offload_optimizer",
)


def conflicts(options: dict[str, Any]) -> Iterator[str]:
    """What in the user's raw engine options contradicts the schema's own fields, or cannot be right here."""
    for name, value in _walk(options):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"engine.deepspeed: {name} = {value}: must be a finite number"
        elif name in _IMPOSSIBLE:
            off, why = _IMPOSSIBLE[name]
            if value not in (off, None) and not (isinstance(value, dict) and value.get("enabled") is False):
                yield f"engine.deepspeed: {name} = {value!r}: cannot be used: {why}; leave it out"
        elif name in _DECIDED_BY:
            yield f"engine.deepspeed: {name} is decided elsewhere; use {_DECIDED_BY[name]}"
        elif name in _SECTIONS and not isinstance(value, dict):
            yield f"engine.deepspeed: {name} = {value!r}: must be a JSON object"


def deepspeed_config(
    engine: EngineConfig,
    training: TrainingConfig,
    *,
    dtype: Literal["bf16", "fp32"],
    world_size: int,
    plan: BatchPlan | None = None,
) -> dict[str, Any]:
    """What `deepspeed.initialize` and `TrainingArguments(deepspeed=...)` take. Raises UserError.

    plan: how batches are taken, where that follows from the data (data.packing).
    """
    if world_size % engine.hpz_partition_size:
        raise UserError(
            f"engine.hpz_partition_size = {engine.hpz_partition_size}: does not divide {world_size} ranks; "
            "use the number of ranks of one node, or 1"
        )
    plan = plan or training.batch_plan(world_size)
    derived = {
        "train_batch_size": plan.micro_batch_size * plan.accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": engine.param_persistence_threshold,
            "stage3_prefetch_bucket_size": engine.prefetch_bucket_size,
            "stage3_max_live_parameters": engine.max_live_parameters,
            "stage3_max_reuse_distance": engine.max_reuse_distance,
            "stage3_allgather_sequential": engine.allgather_sequential,
            "reduce_bucket_size": engine.reduce_bucket_size,
            "zero_hpz_partition_size": engine.hpz_partition_size,
            **{
                name: {"device": device}
                for name, device in (
                    ("offload_param", engine.offload_param),
                    ("offload_optimizer", engine.offload_optimizer),
                )
                if device != "none"
            },
        },
        "zero_allow_untested_optimizer": True,
        # The rest are defaults that engine.deepspeed may change. The optimizer is torch's AdamW, offloaded or
        # not: DeepSpeed's own CPU optimizer compiles C++ at run time.
        "zero_force_ds_cpu_optimizer": False,
        # bf16 gradients of many micro-batches add up badly, and the gradients of adapters are small: fp32.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,  # the run's own log says it
        "wall_clock_breakdown": False,
    }
    return merged(derived, engine.deepspeed)


def _walk(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A new dict: `base` with `extra` in it, section by section."""
    result = dict(base)
    for key, value in extra.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            result[key] = merged(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result
