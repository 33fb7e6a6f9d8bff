"""What can be said of a run in one process, before its ranks start: no rank waits for another that finds a mistake."""

from pathlib import Path

from dora_dist import tasks
from dora_dist.adapters.components import Budget
from dora_dist.adapters.method import AdapterMethod
from dora_dist.adapters.methods import chosen
from dora_dist.adapters.storage import PLAIN, storage_of
from dora_dist.config import AdapterConfig, ModelConfig, RunConfig, deepspeed_options
from dora_dist.models.folder import check_base, read_config, transformers_config
from dora_dist.runtime import distributed, extras
from dora_dist.runtime.errors import UserError
from dora_dist.training import optimizers


def check(config: RunConfig) -> None:
    """Raise UserError for files that are missing, fields that contradict one another and options that nobody takes.

    Settles on an accelerator (DS_ACCELERATOR): DeepSpeed, which `engine.deepspeed` is compared with, looks for one
    as it is imported.
    """
    tasks.check(config)
    check_storage(config.model, config.adapter)
    config.check_files()
    check_base(config)
    config.deepspeed_config(distributed.launched_world_size())
    if config.training.max_steps is not None:
        pruning_budget(config.adapter, config.training.max_steps)
    distributed.choose_accelerator(config.engine.accelerator)
    distributed.check_attention(config.model.attn_implementation)
    deepspeed_options.check(config.engine.deepspeed)
    optimizers.check(config.training)
    for tracker in config.logging.every_tracker:
        extras.need(tracker, purpose=f'logging.trackers: "{tracker}"')


def check_storage(model: ModelConfig, adapter: AdapterConfig) -> None:
    """Raise UserError for a method or a storage that does not exist, and for a storage where no weight is frozen."""
    method, storage = chosen(adapter), storage_of(model.storage, model.storage_settings)
    if storage is not PLAIN and not isinstance(method, AdapterMethod):
        raise UserError(
            f'model.storage = "{storage.name}": holds weights that are frozen, and adapter.method = "{adapter.method}" '
            f'trains them; set model.storage to "{PLAIN.name}", or train an adapter'
        )


def check_own_code(model: ModelConfig, adapter: AdapterConfig, base: Path) -> None:
    """Raise UserError where a run would leave what nothing can merge or evaluate: a whole model with its own code.

    An adapter of such a model is a folder that other tools take. `base` is the folder of model.path.
    """
    method = chosen(adapter)
    has_code = model.trust_remote_code and read_config(base).get("auto_map")
    if not has_code or isinstance(method, AdapterMethod):
        return
    try:
        tasks.task_named(model.task).head(model).model_class(transformers_config(base))
    except UserError as error:
        raise UserError(
            f"model.trust_remote_code = true: {base} needs its own code, which consolidate and evaluate never run, and "
            f"a checkpoint of {method.title} is of use to nothing else; train an adapter, or give a model whose code "
            "is in transformers"
        ) from error


def pruning_budget(adapter: AdapterConfig, steps: int) -> Budget | None:
    """How components are pruned in a run of `steps` optimizer steps; None without dynamic rank.

    Raises UserError where the run is too short for it.
    """
    if not adapter.dynamic_rank:
        return None
    assert adapter.r is not None and adapter.start_rank is not None  # config/conflicts.py refuses it
    try:
        return Budget.of_run(
            adapter.r,
            adapter.start_rank,
            steps,
            start=adapter.prune_start,
            stop=adapter.prune_stop,
            every=adapter.prune_every,
            schedule=adapter.prune_schedule,
        )
    except ValueError as error:
        raise UserError(
            f"adapter.prune_every = {adapter.prune_every}: {error}; lower it, widen adapter.prune_start and "
            "adapter.prune_stop, or train for more steps"
        ) from error
