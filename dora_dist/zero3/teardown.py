"""Letting go of an engine, so that its memory is free for the next one in the same process.

`DeepSpeedEngine.destroy` removes hooks; what it leaves refers to the model from places that outlive the engine, and
with it to shards, masters, Adam's moments and, on a GPU, buckets.
"""

import gc
import inspect
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups


def release(engine: Any) -> None:
    """End an engine (collective). Its memory is free once the caller's own references to engine and model are gone."""
    engine.destroy()
    # The root module is put on this stack when an engine is made, and stays there.
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]
    _class_level_cache().cache_clear()
    _end_secondary_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def abandon_forward(engine: Any) -> None:
    """After a forward that ended in an exception, on every rank alike: give back the weights that it had gathered."""
    engine.empty_partition_cache()
    FWD_MODULE_STACK[:] = [engine.module]  # without the modules that it was in


def collect() -> None:
    """Free what nothing refers to any more: engines, trainers and callbacks refer to one another."""
    gc.collect()
    get_accelerator().empty_cache()


def _class_level_cache() -> Any:
    """What the coordinators of all engines remember of releasing; its keys hold coordinators and modules."""
    instrumented = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    return inspect.getclosurevars(instrumented).nonlocals["func"]


def _end_secondary_group() -> None:
    """hpZ's group of the ranks of a node: the next engine makes its own, and refuses to find one."""
    group = groups._get_zero_param_intra_parallel_group()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if group is not None:
        dist.destroy_process_group(group)
