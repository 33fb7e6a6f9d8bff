"""What a run reads before its model is built: base, data, the adapter to start from; the same on every rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.adapters.adapter_folder import SavedAdapter
from dora_dist.adapters.folders import read_adapter
from dora_dist.config import RunConfig
from dora_dist.config.schema import BatchPlan
from dora_dist.data import TokenizedData, read, warn_of_the_whole
from dora_dist.models.families import check_packs
from dora_dist.models.folder import check_base, transformers_config
from dora_dist.models.vocabulary import check_vocabulary
from dora_dist.runtime.agreement import check_agreement
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import wanted
from dora_dist.tasks import task_named
from dora_dist.training.agreement import of_data, of_model_folder
from dora_dist.training.blocks import about_data
from dora_dist.training.checks import check_own_code
from dora_dist.training.fetching import fetched
from dora_dist.training.loaders import batch_plan
from dora_dist.training.samples import Samples, read_samples


@dataclass(frozen=True)
class Inputs:
    """What a run learns from, and from what it starts."""

    base: Path
    """The base model's folder on this node."""
    processor: Any
    """What turns records into a model's input: a tokenizer, which for texts with pictures has an image processor."""
    data: TokenizedData
    contents: dict[str, str]
    """A short text about each set of the data that differs where the set does."""
    start_from: SavedAdapter | None
    plan: BatchPlan
    """How each rank takes its part of every global batch."""
    samples: Samples | None
    """What the model answers after each evaluation, if anything."""


def read_inputs(config: RunConfig, world: World) -> Inputs:
    """Fetch and read everything, and compare it over the ranks (collective). Raises UserError on every rank."""
    local, model = fetched(config, world), config.model
    base = Path(local.model.path)
    with together("reading the base model's files"):  # of the hub: what is here was looked at before
        check_base(local)
        base_config = transformers_config(base, model.trust_remote_code)
        check_own_code(model, config.adapter, base)
    with together("reading the data"):
        processor, data = read_data(local, base, progress=world.first)
        plan = batch_plan(config, data, world.world_size)
    if world.first:
        about_data(config.data, data)  # by the names that the user gave, not by their places in the hub's cache
    with together("reading the base model's files"):
        files = of_model_folder("base model", base, patterns=wanted(model.trust_remote_code))
    start_from = None
    if config.adapter.init_from:
        with together("reading adapter.init_from"):
            folder = Path(config.adapter.init_from)
            start_from = read_adapter(folder)
            files |= of_model_folder("adapter.init_from", folder, whole=True)
    with together("reading the data"):
        contents = of_data(data)
    check_agreement(world, files | contents)
    tokenizer, rows = task_named(model.task).tokenizer(processor), base_config.get_text_config().vocab_size
    check_vocabulary(tokenizer, rows, model.path, ids=data.token_ids())
    data.train.refuse_tokens(rows)
    samples = read_samples(local, base, processor, data, world=world)
    return Inputs(base, processor, data, contents, start_from, plan, samples)


def read_data(config: RunConfig, base: Path, *, progress: bool) -> tuple[Any, TokenizedData]:
    """The tokenizer (or picture processor) and the data of a run whose names are `fetched`. Raises UserError."""
    task = task_named(config.model.task)
    if config.data.packing:
        check_packs(transformers_config(base, config.model.trust_remote_code))
    processor = task.processor(base, config.model, config.data)
    reader = task.reader(processor, model=config.model, data=config.data)
    training = config.training
    places = (training.max_steps or 0) * training.global_batch_size
    data = read(reader, config.data, seed=training.seed, progress=progress, places=places)
    warn_of_the_whole(config.data, data, batch=config.training.global_batch_size)
    if config.training.eval_every and data.validation is None:
        raise UserError(
            f"training.eval_every = {config.training.eval_every}: there is nothing to evaluate on; set "
            "data.validation or data.validation_samples"
        )
    task.check_sets(data, config.training)
    return processor, data
