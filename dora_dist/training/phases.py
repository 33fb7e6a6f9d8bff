"""A run after its ranks have met: read, plan, then phase by phase build a model and train it.

A run has one phase; with dynamic rank a second follows once the mask is final: a new engine without the pruned
components goes on from the checkpoint that the first phase ended with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from dora_dist.adapters.components import Budget
from dora_dist.adapters.inject import with_ranks
from dora_dist.adapters.methods import chosen
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.adapter_of_model import Origin
from dora_dist.checkpoint.format import check_budget
from dora_dist.checkpoint.history import History
from dora_dist.checkpoint.in_use import InUse
from dora_dist.checkpoint.manifest import read_manifest
from dora_dist.checkpoint.resuming import forgets_best, located, optimizer_steps
from dora_dist.checkpoint.saving import Saver
from dora_dist.config import RunConfig
from dora_dist.models.build import AdaptedModel, checkpoint_activations
from dora_dist.runtime.agreement import check_agreement, of_code
from dora_dist.runtime.console import say
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.errors import Stopped
from dora_dist.runtime.folders import write_json
from dora_dist.runtime.run_log import RunLog
from dora_dist.tasks import task_named
from dora_dist.training import doubts, facts
from dora_dist.training.agreement import of_configuration, of_plugins
from dora_dist.training.arguments import training_arguments
from dora_dist.training.blocks import about_model, opening
from dora_dist.training.checkpoints import Checkpoints
from dora_dist.training.checks import pruning_budget
from dora_dist.training.inputs import Inputs, read_inputs
from dora_dist.training.loaders import Loaders
from dora_dist.training.model import adapted_model, adapter_plan
from dora_dist.training.noise import add_noise
from dora_dist.training.pruning import Pruning
from dora_dist.training.ranks import Ranks
from dora_dist.training.rates import shares
from dora_dist.training.recording import AnalysisCallback
from dora_dist.training.reporting import ReportCallback
from dora_dist.training.resume import check_unused, compare, find_checkpoint, is_finished, read_by_all
from dora_dist.training.steps import Deadlines, Randomness
from dora_dist.training.trackers import Trackers
from dora_dist.training.trainer import DoraTrainer
from dora_dist.training.unreadable import Unreadable
from dora_dist.zero3.teardown import collect


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one model."""

    checkpoint: Path | None
    """Where it goes on from; None: the run's beginning."""
    budget: Budget | None
    """How its components are pruned, if they are."""
    trained_with: Mapping[str, Any]
    """What its checkpoints record of the run (`resuming.record`)."""
    ranks: Mapping[str, int] | None = None
    """Components left in each layer, once pruning is over; None: as the configuration says."""
    changed: Mapping[str, str] = field(default_factory=dict)
    """What differs from the run that wrote the checkpoint."""


def run(
    config: RunConfig,
    ranks: Ranks,
    log: RunLog,
    *,
    history: History,
    trackers: Trackers,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train from the beginning, or from a checkpoint, to the last step (collective); returns the newest checkpoint."""
    world, run_dir = ranks.world, Path(config.checkpoint.run_dir)
    check_agreement(world, of_code() | of_plugins(config.plugins) | of_configuration(config))
    with InUse(run_dir) as in_use:
        with together("looking whether the run folder is in use"):
            if world.first and run_dir.exists():  # a run that cannot start makes no folder
                in_use.claim()
        resume = find_checkpoint(config.checkpoint.resume, run_dir, world)
        if resume is not None and is_finished(config, resume):
            return resume
        if world.first:
            opening(run_dir, world, resume)
        inputs = read_inputs(config, world)
        phase: Phase | None = first_phase(config, inputs, world, resume=resume)
        while phase is not None:
            phase = train_phase(
                config,
                inputs,
                phase,
                ranks=ranks,
                log=log,
                in_use=in_use,
                history=history,
                trackers=trackers,
                callbacks=callbacks,
            )
            collect()  # the engine that was: the next one needs its memory
    newest = [run_folder.newest_checkpoint(run_dir)]
    dist.broadcast_object_list(newest)  # other nodes need not see rank 0's folder unless they resume from it
    assert newest[0] is not None
    return newest[0]


def first_phase(config: RunConfig, inputs: Inputs, world: World, *, resume: Path | None) -> Phase:
    """Where the run begins, or goes on (collective). Raises UserError, on every rank, where it cannot."""
    data, adapter = inputs.data, config.adapter
    steps = optimizer_steps(config.training, data.train.parts)
    budget = pruning_budget(adapter, steps)
    shares(config.training, steps)  # refuses a schedule that cannot be
    doubts.of_settings(config.training, config.checkpoint, steps)
    phase = Phase(resume, budget, {})
    if resume is not None and budget is not None:
        with together(f"reading {resume}"):
            manifest = read_manifest(resume, verify=False)
            if manifest["compacted"]:  # pruning is over, whatever the budget says
                phase = replace(phase, ranks=manifest["adapter_ranks"])
            else:
                check_budget(resume, manifest, budget)
    trained_with, changed = compare(config, inputs, world, resume=resume)
    return replace(phase, trained_with=trained_with, changed=changed)


def train_phase(
    config: RunConfig,
    inputs: Inputs,
    phase: Phase,
    *,
    ranks: Ranks,
    log: RunLog,
    in_use: InUse,
    history: History,
    trackers: Trackers,
    callbacks: Sequence[TrainerCallback],
) -> Phase | None:
    """Build a phase's model and train it to the phase's end (collective). Returns the next phase; None after the last.

    Raises Stopped where a signal ended it before its last step; what it had learnt is saved then.
    """
    world, run_dir = ranks.world, Path(config.checkpoint.run_dir)
    ranks.stop.can_save = False
    trainer = build_trainer(config, inputs, phase, ranks=ranks, history=history, trackers=trackers, callbacks=callbacks)
    with together("writing the run folder"):  # only now: a run that cannot start leaves nothing behind
        if world.first:
            in_use.claim()
            deepspeed = config.deepspeed_config(world.world_size, inputs.plan)
            _write_run_folder(config, run_dir, deepspeed, phase.checkpoint)
        _begin(history, config, inputs, phase, world=world)
        history.add("model", **facts.of_model(trainer.run))
    first_host = [world.host]
    dist.broadcast_object_list(first_host)
    if log.path is None:
        log.move_into(run_folder.log_file(run_dir, world.host, first_host[0]))
    trainer.train(resume_from_checkpoint=None if phase.checkpoint is None else str(phase.checkpoint))
    trainer.finish_saving()
    step, last = trainer.state.global_step, trainer.state.max_steps
    if step < last and trainer.stopping:
        why = ranks.stop.signal or "a signal to another rank"
        raise Stopped(
            f"{why} at step {step:,} of {last:,}; saved {run_dir / f'checkpoint-{step}'}. "
            "To go on: the same command with --resume"
        )
    following = None
    if trainer.ended_early is not None:
        history.add("early_stop", text=trainer.ended_early)
        say(f"\nended early: {trainer.ended_early}")
    elif step < last:
        following = compacted_phase(phase, trainer.pruning, run_dir, ranks.world)
    ranks.watch.before_exit = lambda: None
    trainer.close()
    return following


def compacted_phase(phase: Phase, pruning: Pruning, run_dir: Path, world: World) -> Phase:
    """The phase without the components that are pruned for good, from the checkpoint just written (collective)."""
    pruned = pruning.events[-1].pruned
    say(f"\nthe mask is final: training goes on without the {pruned:,} pruned components")
    checkpoint = read_by_all(run_folder.newest_checkpoint(run_dir), world)
    assert checkpoint is not None
    manifest = read_manifest(checkpoint, verify=False)
    return replace(phase, checkpoint=checkpoint, ranks=manifest["adapter_ranks"], changed={})


def build_trainer(
    config: RunConfig,
    inputs: Inputs,
    phase: Phase,
    *,
    ranks: Ranks,
    history: History,
    trackers: Trackers,
    callbacks: Sequence[TrainerCallback],
) -> DoraTrainer:
    """The model of a phase, adapted and sharded, and what trains it (collective)."""
    world, training, data = ranks.world, config.training, inputs.data
    deepspeed = config.deepspeed_config(world.world_size, inputs.plan)
    args = training_arguments(config, inputs.plan, deepspeed)
    adapted = _build_model(config, inputs, phase, deepspeed=deepspeed)
    if world.first:
        about_model(config, adapted, world, parts=data.train.parts, plan=inputs.plan)
    task = task_named(config.model.task)
    objective = task.objective(inputs.processor, adapted.model, data=config.data, training=training)
    loaders = Loaders(
        data,
        objective,
        inputs.plan,
        world=world,
        training=training,
        row_length=config.data.longest_row if config.data.packing else None,
        workers=config.data.num_workers,
        pin_memory=args.device.type != "cpu",
    )
    pruning = Pruning(phase.budget, config.adapter)
    run_dir = Path(config.checkpoint.run_dir)
    report = ReportCallback(
        world, adapted, pruning, history=history, trackers=trackers, run_dir=run_dir, options=config.logging
    )
    # Deadlines end before the report draws what only rank 0 draws.
    ours: list[TrainerCallback] = [Randomness(training.seed, world.rank), Deadlines(ranks.watch, config.engine)]
    if config.analysis.every != 0:
        ours.append(_recorder(config, adapted, phase, world))
    ours.append(report)
    elsewhere = phase.checkpoint is not None and phase.checkpoint.resolve().parent != run_dir.resolve()
    return DoraTrainer(
        adapted,
        args,
        loaders,
        ranks=ranks,
        run_dir=run_dir,
        training=training,
        engine=config.engine,
        pruning=pruning,
        unreadable=Unreadable(
            objective.problems,
            {"data.bad_images": config.data.bad_images, "data.bad_records": config.data.bad_records},
            world,
        ),
        report=report,
        samples=inputs.samples,
        callbacks=[*ours, *callbacks],
        open_checkpoints=partial(_open_checkpoints, config, inputs, phase, world=world, adapted=adapted),
        forget_best=forgets_best(phase.changed) or elsewhere,
    )


def _recorder(config: RunConfig, adapted: AdaptedModel, phase: Phase, world: World) -> AnalysisCallback:
    return AnalysisCallback(
        adapted,
        config.analysis,
        method=chosen(config.adapter).title,
        world=world,
        run_dir=Path(config.checkpoint.run_dir),
        pruned=phase.ranks is not None,
    )


def _build_model(config: RunConfig, inputs: Inputs, phase: Phase, *, deepspeed: dict[str, Any]) -> AdaptedModel:
    training = config.training
    plan = adapter_plan(config.adapter)
    adapted = adapted_model(
        inputs.base,
        config.model,
        config.adapter,
        plan=plan if phase.ranks is None else with_ranks(plan, phase.ranks),
        deepspeed=deepspeed,
        start_from=inputs.start_from,
        seed=training.seed,
        inspect=lambda model: doubts.of_model(model, training, config.data.longest_text, inputs.data),
    )
    adapted.family.prepare_for_training(adapted.model)
    if training.activation_checkpointing:
        selective = training.activation_checkpointing == "selective"
        checkpoint_activations(adapted.model, "all" if selective else "none" if training.recompute_all else "small")
    if training.neftune_alpha is not None:
        add_noise(adapted.model, training.neftune_alpha)
    return adapted


def _open_checkpoints(
    config: RunConfig, inputs: Inputs, phase: Phase, engine: Any, *, world: World, adapted: AdaptedModel
) -> Checkpoints:
    """What writes the checkpoints of an engine (collective)."""
    model, task = located(config).model, task_named(config.model.task)
    files = task.files(inputs.processor, inputs.base) if world.first else {}
    origin = Origin(
        method=chosen(config.adapter),
        base_model=model.path,
        revision=model.revision,
        head=adapted.head,
        trained_modules=adapted.trained,
        trained_parameters=adapted.trained_parameters,
        base_digest=adapted.base_digest,
        files=files,
        run=config.model_dump(mode="json") if world.first else {},
    )
    run_dir, timeout_s = Path(config.checkpoint.run_dir), config.engine.start_timeout_s
    saver = Saver(engine, adapted.model, origin, run_dir=run_dir, timeout_s=timeout_s)
    return Checkpoints(saver, config.checkpoint, world, trained_with=phase.trained_with, metric=config.training.metric)


def _begin(history: History, config: RunConfig, inputs: Inputs, phase: Phase, *, world: World) -> None:
    """The history's first line of this start; a later phase is of the same start."""
    if not history.began:
        step = 0 if phase.checkpoint is None else run_folder.step_of(phase.checkpoint)
        steps = optimizer_steps(config.training, inputs.data.train.parts)
        start = facts.of_start(world, steps=steps, checkpoint=phase.checkpoint, changed=phase.changed)
        history.begin(step, **start, **facts.of_data(inputs.data))


def _write_run_folder(config: RunConfig, run_dir: Path, deepspeed: dict[str, Any], resume: Path | None) -> None:
    if resume is None:
        check_unused(run_dir)  # another run may have made the folder while this one loaded its model
    step = run_folder.step_of(resume) if resume is not None else 0
    run_folder.clear_leftovers(run_dir)
    run_folder.set_aside_after(run_dir, step)
    run_folder.forget_after(run_dir, step)
    run_folder.name_run(run_dir, resume)
    # In this order: config.check_files takes a config.json without the other for somebody else's.
    write_json(run_dir / run_folder.DEEPSPEED, deepspeed)
    write_json(run_dir / run_folder.CONFIG, json.loads(located(config).to_json()))
