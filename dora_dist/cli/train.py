"""`dora-dist train`, and the schema of its config files: `schema`."""

import argparse
import json

from dora_dist.cli.options import Commands, declare
from dora_dist.config import RunConfig, add_arguments
from dora_dist.runtime.console import say
from dora_dist.tasks import problems


def declare_train(commands: Commands) -> None:
    command = declare(
        commands,
        "train",
        _train,
        summary="fine-tune a model as a config file says, here or on the ranks that a launcher starts",
        example="dora-dist train --config configs/quickstart.json --training.max_steps 10\n"
        "          deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart.json",
        usage="--config FILE [--resume] [--SECTION.FIELD VALUE ...]",
    )
    command.add_argument("--config", required=True, metavar="FILE", help="JSON or YAML file that describes the run")
    command.add_argument("--resume", action="store_true", help="short for --checkpoint.resume auto")
    # DeepSpeed's launcher adds it to every script; the environment says the same.
    command.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    add_arguments(command, RunConfig)


def load_config(options: argparse.Namespace, *, check_files: bool) -> RunConfig:
    """The run that the options of `train` describe. Raises UserError."""
    resume = ["--checkpoint.resume=auto"] if options.resume else []
    return RunConfig.load(options.config, [*resume, *options.overrides], check_files=check_files, rules=problems)


def _train(options: argparse.Namespace) -> None:
    config = load_config(options, check_files=True)
    import torch.distributed as dist

    from dora_dist.runtime import distributed
    from dora_dist.training.run import train

    taken_over = dist.is_available() and dist.is_initialized()  # whoever formed the group leaves it
    train(config)
    if not taken_over:
        distributed.stop()


def declare_schema(commands: Commands) -> None:
    declare(
        commands,
        "schema",
        _schema,
        summary="print the JSON schema of config files, for editors",
        example="dora-dist schema > dora_dist.schema.json",
    )


def _schema(options: argparse.Namespace) -> None:
    say(json.dumps(RunConfig.json_schema(), indent=2))
