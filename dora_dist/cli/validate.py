"""`dora-dist validate`: what can be said of a run without starting it; with --data, what it would learn."""

import argparse
import json
import sys
from pathlib import Path

from dora_dist.cli.options import Commands, declare, positive
from dora_dist.config import AdapterConfig, ModelConfig, RunConfig, add_arguments, deepspeed_options
from dora_dist.tasks import problems, task_named


def declare_validate(commands: Commands) -> None:
    command = declare(
        commands,
        "validate",
        _validate,
        summary="check a config file, and the files that it names, without starting anything",
        example="dora-dist validate configs/llama7b_dora.json --data --data.train mine.jsonl",
        usage="CONFIG [--data] [--world-size N] [--no-files] [--SECTION.FIELD VALUE ...]",
    )
    command.add_argument("config", metavar="CONFIG", help="JSON or YAML file that describes the run")
    command.add_argument(
        "--data",
        action="store_true",
        help="read and tokenize the data as training does; show figures, and two samples with what is learnt of them",
    )
    command.add_argument(
        "--world-size", type=positive, metavar="N", help="check for N ranks; prints the DeepSpeed JSON"
    )
    command.add_argument("--no-files", action="store_true", help="do not look whether models and data are here")
    add_arguments(command, RunConfig)


def _validate(options: argparse.Namespace) -> None:
    config = RunConfig.load(options.config, options.overrides, check_files=not options.no_files, rules=problems)
    if not options.no_files:
        from dora_dist.models.folder import check_base

        check_base(config)
    _check_names(config.adapter, config.model)
    if config.engine.deepspeed:
        deepspeed_options.check(config.engine.deepspeed)
    if options.world_size is not None:
        print(json.dumps(config.deepspeed_config(options.world_size), indent=2))
    if config.adapter.dynamic_rank and config.training.max_steps is not None:
        from dora_dist.training.checks import pruning_budget

        pruning_budget(config.adapter, config.training.max_steps)
    if options.data:
        _show_data(config, options.world_size or 1)
    adapter, training = config.adapter, config.training
    most = training.global_batch_size
    evenly = ", ".join(str(count) for count in range(1, most + 1) if config.training.batch_plan(count).empty == 0)
    print(
        f"{options.config} is valid: {_method(adapter)} on "
        f"{config.model.path}, {training.global_batch_size} records a step; runs on "
        f"{f'1 to {most} ranks (evenly on {evenly})' if most > 1 else '1 rank'}; writes {config.checkpoint.run_dir}",
        file=sys.stderr,
    )


def _check_names(adapter: AdapterConfig, model: ModelConfig) -> None:
    """Raise UserError for a method or storage that does not exist. The defaults do, and need not wait for torch."""
    usual = ModelConfig.model_fields["storage"].default
    if adapter.method is not None or adapter.settings or model.storage != usual or model.storage_settings:
        from dora_dist.training.checks import check_storage

        check_storage(model, adapter)


def _method(adapter: AdapterConfig) -> str:
    if adapter.method is None:  # without torch
        usual = "DoRA" if adapter.weight_decomposed else "LoRA"
        return f"{usual}{' with dynamic rank' if adapter.dynamic_rank else ''} r={adapter.r}"
    from dora_dist.adapters.methods import chosen

    method = chosen(adapter)
    settings = method.settings()
    return f"{method.title} r={settings['r']}" if "r" in settings else method.title


def _show_data(config: RunConfig, world_size: int) -> None:
    """Read a run's data as training does, and show it. Of the base only tokenizer and configuration are needed."""
    from dora_dist.checkpoint.resuming import optimizer_steps
    from dora_dist.cli import preview
    from dora_dist.training.checks import pruning_budget
    from dora_dist.training.fetching import fetched_for_data
    from dora_dist.training.inputs import read_data
    from dora_dist.training.loaders import packed_rows

    local = fetched_for_data(config)
    processor, data = read_data(local, Path(local.model.path), progress=True)
    tokenizer = task_named(config.model.task).tokenizer(processor)
    steps = optimizer_steps(config.training, data.train.parts)
    pruning_budget(config.adapter, steps)
    rows = packed_rows(config, data, world_size) if config.data.packing else None
    preview.show(
        data,
        tokenizer,
        title=f"{config.data.format} records",
        steps=steps,
        batch=config.training.global_batch_size,
        rows=rows,
        counted=not config.data.streaming,
    )
