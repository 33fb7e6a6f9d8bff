"""One run, top to bottom: check, start ranks, build, load, train, save."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dora_dist.adapters.components import Budget
from dora_dist.adapters.inject import with_ranks
from dora_dist.adapters.peft_format import read_peft_folder
from dora_dist.adapters.storage import storage_of
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.resuming import located, optimizer_steps
from dora_dist.config import RunConfig, deepspeed_options
from dora_dist.models.folder import check_base, transformers_config
from dora_dist.runtime import distributed, plugins
from dora_dist.runtime.agreement import check_agreement, of_code
from dora_dist.runtime.console import say
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.errors import Stopped, UserError
from dora_dist.runtime.folders import DISK_IS_FULL, disk_errors
from dora_dist.runtime.hub import wanted
from dora_dist.runtime.launchers import rank_among_several
from dora_dist.runtime.run_log import RunLog
from dora_dist.runtime.stopping import StopRequest
from dora_dist.runtime.watch import Watch
from dora_dist.tasks import check, task_named
from dora_dist.training.agreement import of_configuration, of_data, of_model_folder
from dora_dist.training.resume import check_unused, compare, find_checkpoint, is_finished, read_by_all


def train(config: RunConfig) -> Path:
    """Fine-tune as a configuration says, on however many ranks the launcher started.

    Args:
        config: the run: `RunConfig.load(FILE, OVERRIDES)` or `RunConfig.from_dict(DICT)`.

    Returns: the folder of the newest checkpoint, `RUN_DIR/checkpoint-STEP`; its `adapter/` is a PEFT folder.

    Raises: UserError, on every rank, for everything that a user can fix; what can be checked without ranks is checked
    before a process group exists. Stopped where a signal ended the run (what it had learnt is saved), LostRank where
    another rank is gone.

    Example::

        config = RunConfig.load("configs/quickstart.json", ["--training.max_steps=10"])
        checkpoint = train(config)
    """
    started = time.perf_counter()
    plugins.load(config.plugins)
    check(config)
    storage_of(config.model.storage)
    config.check_files()
    check_base(config)
    config.deepspeed_config(distributed.launched_world_size())
    if config.training.max_steps is not None:
        pruning_budget(config, config.training.max_steps)
    distributed.choose_accelerator(config.engine.accelerator)
    distributed.check_attention(config.model.attn_implementation)
    deepspeed_options.check(config.engine.deepspeed)
    with RunLog(rank_among_several(os.environ) or 0) as log, StopRequest() as stop:
        distributed.leave_nccl_errors_to_the_watch()
        world = distributed.start(config.engine.start_timeout_s)
        from dora_dist.training.blocks import closing

        run_dir = Path(config.checkpoint.run_dir)
        with Watch(world, config.engine.start_timeout_s) as watch, disk_errors(run_dir, only=DISK_IS_FULL):
            checkpoint = _run(config, world, watch, stop, log)
        if world.first:
            closing(checkpoint, time.perf_counter() - started)
    return checkpoint


def _run(config: RunConfig, world: World, watch: Watch, stop: StopRequest, log: RunLog) -> Path:
    from dora_dist.training.blocks import opening
    from dora_dist.zero3.teardown import collect

    check_agreement(world, of_code() | of_configuration(config))
    run_dir = Path(config.checkpoint.run_dir)
    with run_folder.InUse(run_dir) as in_use:
        with together("looking whether the run folder is in use"):
            if world.first and run_dir.exists():  # a run that cannot start makes no folder
                in_use.claim()
        resume = find_checkpoint(config, run_dir, world)
        if resume is not None and is_finished(config, resume):
            return resume
        if world.first:
            opening(config, world, resume)
        compacting = _fine_tune(config, world, watch, stop, log, in_use, resume)
        collect()
        if compacting:
            compacted = read_by_all(run_folder.newest_checkpoint(run_dir), world)
            _fine_tune(config, world, watch, stop, log, in_use, compacted)
    newest = [run_folder.newest_checkpoint(run_dir)]
    dist.broadcast_object_list(newest)  # other nodes need not see rank 0's folder unless they resume from it
    assert newest[0] is not None
    return newest[0]


def _fine_tune(
    config: RunConfig,
    world: World,
    watch: Watch,
    stop: StopRequest,
    log: RunLog,
    in_use: run_folder.InUse,
    resume: Path | None,
) -> bool:
    """Build and train. True if the run stopped early, to go on from its newest checkpoint with smaller adapters."""
    run_dir = Path(config.checkpoint.run_dir)
    stop.can_save = False
    trainer = _build(config, world, watch, stop, resume)
    with together("writing the run folder"):  # only now: a run that cannot start leaves nothing behind
        if world.first:
            in_use.claim()
            _write_run_folder(config, run_dir, world, resume)
    first_host = [world.host]
    dist.broadcast_object_list(first_host)
    if log.path is None:
        log.move_into(run_folder.log_file(run_dir, world.host, first_host[0]))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.finish_saving()
    step, last = trainer.state.global_step, trainer.state.max_steps
    if step < last and trainer.stopping:
        why = stop.signal or "a signal to another rank"
        raise Stopped(
            f"{why} at step {step:,} of {last:,}; saved {run_dir / f'checkpoint-{step}'}. "
            "To go on: the same command with --resume"
        )
    if step < last:
        pruned = trainer.pruner.events[-1].pruned
        say(f"\nthe mask is final: training goes on without the {pruned:,} pruned components")
    watch.before_exit = lambda: None
    trainer.close()
    return bool(step < last)


def _build(config: RunConfig, world: World, watch: Watch, stop: StopRequest, resume: Path | None) -> Any:
    # Imported here: they cost seconds, and mistakes in the configuration should show at once.
    from dora_dist.adapters.layer import adapted_layers
    from dora_dist.adapters.methods import chosen
    from dora_dist.checkpoint.format import check_budget
    from dora_dist.models.build import build_model, checkpoint_activations
    from dora_dist.models.vocabulary import check_vocabulary
    from dora_dist.training import doubts
    from dora_dist.training.arguments import training_arguments
    from dora_dist.training.blocks import about_data, about_model
    from dora_dist.training.inputs import fetched, read_data
    from dora_dist.training.model import adapter_plan
    from dora_dist.training.reporting import ReportCallback
    from dora_dist.training.steps import StepCallback
    from dora_dist.training.trainer import DoraTrainer
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement

    model, deepspeed = config.model, config.deepspeed_config(world.world_size)
    local = fetched(config, world)
    base = Path(local.model.path)
    with together("reading the base model's files"):  # of the hub: what is here was looked at before
        check_base(local)
        base_config = transformers_config(base, model.trust_remote_code)
    with together("reading the data"):
        tokenizer, data = read_data(local, base, progress=world.first)
    if world.first:
        about_data(config, data)  # by the names that the user gave, not by their places in the hub's cache
    method, steps = chosen(config.adapter), optimizer_steps(config, len(data.train))
    budget = pruning_budget(config, steps)
    if resume is None or config.checkpoint.resume is not None:  # else the same run goes on, with smaller adapters
        doubts.of_settings(config, steps)
    with together("reading the base model's files"):
        files = of_model_folder("base model", base, patterns=wanted(model.trust_remote_code))
    start_from = None
    if config.adapter.init_from:
        with together("reading adapter.init_from"):
            start_from = read_peft_folder(Path(config.adapter.init_from))
            files |= of_model_folder("adapter.init_from", Path(config.adapter.init_from), whole=True)
    contents = of_data(data)
    check_agreement(world, files | contents)
    task = task_named(model.task)
    check_vocabulary(task.tokenizer(tokenizer), base_config.get_text_config().vocab_size, model.path, data.token_ids())
    plan = adapter_plan(config.adapter)
    if resume is not None and budget is not None:
        with together(f"reading {resume}"):
            manifest = run_folder.read_manifest(resume, verify=False)
            if not manifest["compacted"]:  # else pruning is over, whatever the budget says
                check_budget(resume, manifest, budget)
        if manifest["compacted"]:
            plan = with_ranks(plan, manifest["adapter_ranks"])
    trained_with, changed = compare(config, data.train, contents, base, world, resume)
    args = training_arguments(config, world.world_size, deepspeed)
    run = build_model(
        base,
        plan,
        ShardedPlacement(deepspeed),
        ShardedNormRefresher,
        dtype=model.dtype,
        head=task.head(model),
        storage=storage_of(model.storage),
        trained_modules=config.adapter.trained_modules,
        start_from=start_from,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        seed=config.training.seed,
        inspect=lambda adapted: doubts.of_model(config, adapted, data.train),
    )
    run.family.prepare_for_training(run.model)
    if config.training.activation_checkpointing:
        checkpoint_activations(run.model)
    if config.training.recompute_all:
        for layer in adapted_layers(run.model).values():
            layer.keeps_output = False
    steps = optimizer_steps(config, len(data.train))
    if world.first:
        about_model(config, run, world, steps, steps / -(-len(data.train) // config.training.global_batch_size))
    run_dir = Path(config.checkpoint.run_dir)
    report = ReportCallback(world, run.norms, run_dir, run.weights, config.logging)
    step = StepCallback(world, watch, stop, config)
    callbacks = [step, report, *([_tensorboard(run_dir)] if config.logging.tensorboard else [])]
    trainer = DoraTrainer(
        run, config, method, budget, args, data, tokenizer, world, stop, callbacks, trained_with, changed
    )
    step.trainer = report.trainer = trainer
    return trainer


def _tensorboard(run_dir: Path) -> Any:
    """Hugging Face's callback, with one folder for a run whatever it is resumed from: one curve per metric."""
    from transformers.integrations import TensorBoardCallback

    try:
        callback = TensorBoardCallback()
    except RuntimeError as error:
        raise UserError(
            f"logging.tensorboard = true: {error}; `pip install tensorboard`, or set it to false"
        ) from error
    callback.logging_dir = callback.logging_dir or str(run_dir / run_folder.TENSORBOARD)
    return callback


def pruning_budget(config: RunConfig, steps: int) -> Budget | None:
    """How components are pruned in a run of `steps` optimizer steps; None without dynamic rank.

    Raises UserError where the run is too short for it.
    """
    adapter = config.adapter
    if not adapter.dynamic_rank:
        return None
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


def _write_run_folder(config: RunConfig, run_dir: Path, world: World, resume: Path | None) -> None:
    if resume is None:
        check_unused(run_dir)  # another run may have made the folder while this one loaded its model
    step = run_folder.step_of(resume) if resume is not None else 0
    run_folder.clear_leftovers(run_dir)
    run_folder.set_aside_after(run_dir, step)
    run_folder.forget_metrics_after(run_dir, step)
    run_folder.name_run(run_dir, resume)
    # In this order: config.check_files takes a config.json without the other for somebody else's.
    run_folder.write_json(run_dir / run_folder.DEEPSPEED, config.deepspeed_config(world.world_size))
    run_folder.write_json(run_dir / run_folder.CONFIG, json.loads(located(config).to_json()))
