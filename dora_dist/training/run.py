"""One run, top to bottom: check, start ranks, build, load, train, save."""

import gc
import json
from pathlib import Path
from typing import Any

from dora_dist import distributed, run_folder
from dora_dist.adapters.inject import by_pattern, with_ranks
from dora_dist.adapters.linear import AdapterSpec
from dora_dist.adapters.peft_format import read_peft_folder
from dora_dist.config import RunConfig
from dora_dist.distributed import World, together
from dora_dist.errors import UserError
from dora_dist.models.hub import local_folder


def train(config: RunConfig) -> Path:
    """Fine-tune as `config` says, on however many ranks the launcher started; returns the newest checkpoint.

    What can be checked without ranks is checked before a process group exists. Raises UserError, on every rank, for
    everything a user can mend.
    """
    config.check_files()
    config.deepspeed_config(distributed.launched_world_size())
    distributed.choose_accelerator(config.engine.accelerator)
    config.check_engine_options()
    world = distributed.start(config.engine.start_timeout_s)
    run_dir = Path(config.checkpoint.run_dir)
    with together("looking for earlier checkpoints"):
        resume = _resume_from(config, run_dir)
    compacting = _fine_tune(config, world, run_dir, resume)
    if compacting:
        gc.collect()  # engine, trainer and callbacks refer to one another
        _fine_tune(config, world, run_dir, run_folder.newest_checkpoint(run_dir))
    checkpoint = run_folder.newest_checkpoint(run_dir)
    assert checkpoint is not None
    if world.first:
        print(f"done: {checkpoint} (adapter in PEFT's format: {checkpoint / run_folder.ADAPTER})")
        print(f"merge it with: dora-dist consolidate {run_dir} --output merged/")
    return checkpoint


def _fine_tune(config: RunConfig, world: World, run_dir: Path, resume: Path | None) -> bool:
    """Build and train. True if the run stopped early, to go on from its newest checkpoint with smaller adapters."""
    from accelerate.state import AcceleratorState

    trainer = _build(config, world, run_dir, resume)
    with together("writing the run folder"):  # only now: a run that cannot start leaves nothing behind
        if world.first:
            _write_run_folder(config, run_dir, world)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if not trainer.compacting or trainer.state.global_step >= trainer.state.max_steps:
        return False
    if world.first:
        print(f"the mask is final: going on without the {trainer.pruner.events[-1].pruned:,} pruned components")
    trainer.run.norms.close()
    trainer.model_wrapped.destroy()
    AcceleratorState._reset_state(reset_partial_state=True)
    return True


def _build(config: RunConfig, world: World, run_dir: Path, resume: Path | None) -> Any:
    # Imported here: they cost seconds, and mistakes in the configuration should show at once.
    from dora_dist.models.build import build_model
    from dora_dist.models.tasks import Task
    from dora_dist.training.arguments import training_arguments
    from dora_dist.training.reporting import ReportCallback
    from dora_dist.training.trainer import DoraTrainer, StepCallback
    from dora_dist.zero3.shards import ShardedPlacement, full_numel

    model, deepspeed = config.model, config.deepspeed_config(world.world_size)
    base = local_folder(model.path, model.revision, world)
    tokenizer, data = _data(config, base, world)
    spec = adapter_spec(config)
    with together("reading adapter.init_from"):
        start_from = read_peft_folder(Path(config.adapter.init_from)) if config.adapter.init_from else None
    plan = by_pattern(spec, config.adapter.target_modules, config.adapter.magnitude_only_modules)
    if resume is not None and spec.gated:
        with together(f"reading {resume}"):
            manifest = run_folder.read_manifest(resume, verify=False)
        if manifest.get("compacted"):
            plan = with_ranks(plan, manifest["adapter_ranks"])
    args = training_arguments(config, world.world_size, deepspeed)
    run = build_model(
        base,
        plan,
        ShardedPlacement(deepspeed),
        dtype=model.dtype,
        task=Task(model.task, model.num_labels),
        trained_modules=config.adapter.trained_modules,
        start_from=start_from,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        seed=config.training.seed,
    )
    if config.training.activation_checkpointing and not run.model.supports_gradient_checkpointing:
        kind = type(run.model).__name__
        raise UserError(f"training.activation_checkpointing = true: {kind} has none; set it to false")
    weights = sum(full_numel(p) for p in run.model.parameters())
    trained = sum(full_numel(p) for p in run.model.parameters() if p.requires_grad)
    if world.first:
        print(
            f"{len(run.adapted)} modules adapted, {trained:,} of {weights:,} parameters trained "
            f"({trained / weights:.2%}); rank 0 read {run.base_bytes_read / 1e6:,.1f} MB of the base"
        )
        if run.trained:
            print(f"trained in full: {', '.join(run.trained)}; new: {', '.join(run.fresh) or 'nothing'}")
        for name, (there, here) in run.resized.items():
            print(f"note: {name} starts anew: it is {there} in {model.path}, and {here} for model.num_labels here")
    report = ReportCallback(world, run.norms, run_dir, weights, config.logging)
    step = StepCallback(world, config.training.seed, config.engine.step_timeout_s)
    callbacks = [step, report, *([_tensorboard(run_dir)] if config.logging.tensorboard else [])]
    trainer = DoraTrainer(run, config, spec, args, data, tokenizer, world, callbacks)
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


def adapter_spec(config: RunConfig) -> AdapterSpec:
    """The adapter section as the layer's own specification."""
    adapter = config.adapter
    return AdapterSpec(
        r=adapter.start_rank,
        lora_alpha=adapter.lora_alpha,
        weight_decomposed=adapter.weight_decomposed,
        dropout=adapter.dropout,
        dropout_mode=adapter.dropout_mode,
        norm_gradient=adapter.norm_gradient,
        gated=adapter.dynamic_rank,
    )


def _data(config: RunConfig, base: Path, world: World) -> tuple[Any, Any]:
    from dora_dist.data import build_data
    from dora_dist.models.tasks import GENERATIVE
    from dora_dist.models.tokenizer import load_tokenizer

    with together("reading the data"):
        model = config.model
        tokenizer = load_tokenizer(
            model.tokenizer or str(base),
            trust_remote_code=model.trust_remote_code,
            generative=model.task in GENERATIVE,
        )
        data = build_data(config, tokenizer, progress=world.first)
        if config.training.eval_every and data.validation is None:
            raise UserError(
                f"training.eval_every = {config.training.eval_every}: there is nothing to evaluate on; set "
                "data.validation or data.validation_samples"
            )
    if world.first:
        print(f"training data: {data.train_stats}")
        if data.validation_stats is not None:
            print(f"validation data: {data.validation_stats}")
    return tokenizer, data


def _resume_from(config: RunConfig, run_dir: Path) -> Path | None:
    """The checkpoint to go on from. Raises UserError if a fresh run would mix with an earlier one's files."""
    resume = config.checkpoint.resume
    if resume == "auto":
        return run_folder.newest_checkpoint(run_dir)
    if resume is not None:
        return Path(resume)
    if earlier := run_folder.newest_checkpoint(run_dir):
        raise UserError(
            f"checkpoint.run_dir: {run_dir} already holds a run ({earlier.name}); go on with it by --checkpoint.resume "
            "auto, or give another checkpoint.run_dir"
        )
    return None


def _write_run_folder(config: RunConfig, run_dir: Path, world: World) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(run_dir / run_folder.CONFIG, json.loads(config.to_json()))
    run_folder.write_json(run_dir / "deepspeed.json", config.deepspeed_config(world.world_size))
