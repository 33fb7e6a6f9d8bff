"""`dora-dist train`, and what can be asked of a config file without training: `validate`, `schema`."""

import argparse
import json
import sys

from dora_dist.cli.options import Commands, declare, positive
from dora_dist.config import RunConfig, add_arguments


def declare_train(commands: Commands) -> None:
    command = declare(
        commands,
        "train",
        _train,
        "fine-tune a model as a config file says, here or on the ranks that a launcher starts",
        "dora-dist train --config configs/quickstart.json --training.max_steps 10\n"
        "          deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart.json",
        "--config FILE [--resume] [--SECTION.FIELD VALUE ...]",
    )
    command.add_argument("--config", required=True, metavar="FILE", help="JSON file that describes the run")
    command.add_argument("--resume", action="store_true", help="short for --checkpoint.resume auto")
    # DeepSpeed's launcher adds it to every script; the environment says the same.
    command.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    add_arguments(command, RunConfig)


def load_config(options: argparse.Namespace, *, check_files: bool) -> RunConfig:
    """The run that the options of `train` describe. Raises UserError."""
    resume = ["--checkpoint.resume=auto"] if options.resume else []
    return RunConfig.load(options.config, [*resume, *options.overrides], check_files=check_files)


def _train(options: argparse.Namespace) -> None:
    config = load_config(options, check_files=True)
    import torch.distributed as dist

    from dora_dist import distributed
    from dora_dist.training.run import train

    taken_over = dist.is_available() and dist.is_initialized()  # whoever formed the group leaves it
    train(config)
    if not taken_over:
        distributed.stop()


def declare_validate(commands: Commands) -> None:
    command = declare(
        commands,
        "validate",
        _validate,
        "check a config file, and the files that it names, without starting anything",
        "dora-dist validate configs/llama7b_dora.json --world-size 8 --data.train mine.jsonl",
        "CONFIG [--world-size N] [--no-files] [--SECTION.FIELD VALUE ...]",
    )
    command.add_argument("config", metavar="CONFIG", help="JSON file that describes the run")
    command.add_argument(
        "--world-size", type=positive, metavar="N", help="check for N ranks; prints the DeepSpeed JSON"
    )
    command.add_argument("--no-files", action="store_true", help="do not look whether models and data are here")
    add_arguments(command, RunConfig)


def _validate(options: argparse.Namespace) -> None:
    config = RunConfig.load(options.config, options.overrides, check_files=not options.no_files)
    if not options.no_files:
        from dora_dist.models.folder import check_base

        check_base(config)
    if config.engine.deepspeed:
        config.check_engine_options()
    if options.world_size is not None:
        print(json.dumps(config.deepspeed_config(options.world_size), indent=2))
    if config.adapter.dynamic_rank and config.training.max_steps is not None:
        from dora_dist.training.run import pruning_budget

        pruning_budget(config, config.training.max_steps)
    adapter, training = config.adapter, config.training
    most = training.global_batch_size
    evenly = ", ".join(str(count) for count in range(1, most + 1) if config.batch_plan(count).empty == 0)
    print(
        f"{options.config} is valid: {'DoRA' if adapter.weight_decomposed else 'LoRA'} r={adapter.r} on "
        f"{config.model.path}, {training.global_batch_size} records a step; runs on "
        f"{f'1 to {most} ranks (evenly on {evenly})' if most > 1 else '1 rank'}; writes {config.checkpoint.run_dir}",
        file=sys.stderr,
    )


def declare_schema(commands: Commands) -> None:
    declare(
        commands,
        "schema",
        _schema,
        "print the JSON schema of config files, for editors",
        "dora-dist schema > dora_dist.schema.json",
    )


def _schema(options: argparse.Namespace) -> None:
    print(json.dumps(RunConfig.json_schema(), indent=2))
