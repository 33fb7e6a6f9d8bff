"""The command line `dora-dist`: each command parses its options and calls one function of the library."""

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from dora_dist.config import RunConfig, add_arguments, check_names
from dora_dist.errors import LostRank, Stopped, UserError
from dora_dist.exit_codes import DONE, FAILED, INTERRUPTED, STOPPED, USERS_MISTAKE
from dora_dist.launchers import rank_among_several

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("bf16", "fp16", "fp32")
Commands = Any  # argparse's own type for this is private


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status, one of `exit_codes`; an error of the program is raised."""
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    if tokens and re.match(r"--local[_-]rank=", tokens[0]):  # from `deepspeed --no_python`; the environment says it too
        tokens = tokens[1:]
    try:
        if tokens[:1] in (["train"], ["validate"]):
            check_names(tokens, RunConfig)
        options = build_parser().parse_args(tokens)
        options.handler(options)
    except UserError as error:
        # Every rank says it: the first that ends makes the launcher end the others, maybe unheard.
        rank = rank_among_several(os.environ)
        sys.stderr.write(f"error{'' if rank is None else f' on rank {rank}'}: {error}\n")
        return USERS_MISTAKE
    except LostRank as error:
        sys.stderr.write(f"error on rank {rank_among_several(os.environ)}: {error}\n")
        return error.code
    except Stopped as stopped:
        sys.stderr.write(f"stopped: {stopped}\n")
        return STOPPED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    return DONE


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """What a shell or a launcher starts: `main`, then the end of the process, at once and with its exit status.

    The interpreter's own teardown is left out: threads that libraries leave behind can abort or hang a rank in it.
    """
    try:
        status = main(arguments)
    except Exception:
        traceback.print_exc()
        status = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; parsed options carry the `handler` of their command."""
    parser = argparse.ArgumentParser(
        prog="dora-dist",
        description="DoRA fine-tuning on DeepSpeed ZeRO-3: one JSON file is a run, one command starts it",
        epilog="dora-dist COMMAND --help describes a command and gives an example.",
    )
    parser.add_argument("--version", action="version", version=f"dora-dist {_version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _declare_train(commands)
    _declare_validate(commands)
    _declare_schema(commands)
    _declare_consolidate(commands)
    _declare_import_gguf(commands)
    _declare_assemble_llava(commands)
    _declare_evaluate(commands)
    _declare_env(commands)
    return parser


def _declare_train(commands: Commands) -> None:
    command = _command(
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
    from dora_dist import distributed
    from dora_dist.training.run import train

    train(config)
    distributed.stop()


def _declare_validate(commands: Commands) -> None:
    command = _command(
        commands,
        "validate",
        _validate,
        "check a config file, and the files that it names, without starting anything",
        "dora-dist validate configs/llama7b_dora.json --world-size 8 --data.train mine.jsonl",
        "CONFIG [--world-size N] [--no-files] [--SECTION.FIELD VALUE ...]",
    )
    command.add_argument("config", metavar="CONFIG", help="JSON file that describes the run")
    command.add_argument(
        "--world-size", type=_positive, metavar="N", help="check for N ranks; prints the DeepSpeed JSON"
    )
    command.add_argument("--no-files", action="store_true", help="do not look whether models and data are here")
    add_arguments(command, RunConfig)


def _validate(options: argparse.Namespace) -> None:
    config = RunConfig.load(options.config, options.overrides, check_files=not options.no_files)
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


def _declare_schema(commands: Commands) -> None:
    _command(
        commands,
        "schema",
        _schema,
        "print the JSON schema of config files, for editors",
        "dora-dist schema > dora_dist.schema.json",
    )


def _schema(options: argparse.Namespace) -> None:
    print(json.dumps(RunConfig.json_schema(), indent=2))


def _declare_consolidate(commands: Commands) -> None:
    command = _command(
        commands,
        "consolidate",
        _consolidate,
        "merge an adapter into its base: a plain Hugging Face model folder",
        "dora-dist consolidate runs/quickstart/train --output merged/",
    )
    command.add_argument("path", type=Path, metavar="PATH", help="run folder, checkpoint, or PEFT adapter folder")
    _add_output(command, "the merged model")
    command.add_argument("--base", metavar="MODEL", help="base model folder or hub name (default: the run's own)")
    command.add_argument("--dtype", choices=_DTYPES, help="number format to write (default: the base's)")
    command.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest file (default: %(default)s)",
    )


def _consolidate(options: argparse.Namespace) -> None:
    from dora_dist.consolidate import consolidate, find_adapter

    adapter, found = find_adapter(options.path)
    base = options.base or found
    if base is None:
        raise UserError(f"{options.path}: does not say what its base model is; give it with --base MODEL")
    result = consolidate(
        adapter,
        base,
        options.output,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_size,
        overwrite=options.overwrite,
    )
    print(
        f"{options.output}: {result['merged']} of {result['tensors']} tensors merged, "
        f"{result['bytes_written'] / 1e9:.3f} GB written in {result['seconds']:.1f} s"
    )


def _declare_import_gguf(commands: Commands) -> None:
    command = _command(
        commands,
        "import-gguf",
        _import_gguf,
        "convert a GGUF file to a Hugging Face model folder, once",
        "dora-dist import-gguf SmolLM2-135M-Instruct.gguf --output base/",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="GGUF file")
    _add_output(command, "the model")
    command.add_argument(
        "--dtype", choices=_DTYPES, default="bf16", help="number format to write (default: %(default)s)"
    )


def _import_gguf(options: argparse.Namespace) -> None:
    from dora_dist.models.gguf import import_gguf

    import_gguf(options.file, options.output, dtype=options.dtype, overwrite=options.overwrite)
    print(options.output)


def _declare_assemble_llava(commands: Commands) -> None:
    command = _command(
        commands,
        "assemble-llava",
        _assemble_llava,
        "make a LLaVA of a vision tower and a language model, with a fresh projector",
        "dora-dist assemble-llava --vision clip/ --language vicuna/ --output llava/",
    )
    command.add_argument("--vision", required=True, metavar="MODEL", help="vision tower: folder or hub name")
    command.add_argument("--language", required=True, metavar="MODEL", help="language model: folder or hub name")
    _add_output(command, "the LLaVA")
    command.add_argument(
        "--image-token",
        default="<image>",
        metavar="TOKEN",
        help="token that stands for pictures: one that the tokenizer has, or else a new one (%(default)s)",
    )
    command.add_argument(
        "--feature-layer",
        type=int,
        default=-2,
        metavar="N",
        help="layer of the tower whose output is used (%(default)s)",
    )
    command.add_argument(
        "--image-size", type=_positive, metavar="PIXELS", help="side length of pictures (default: the tower's)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the projector (%(default)s)")


def _assemble_llava(options: argparse.Namespace) -> None:
    from dora_dist.config import is_local
    from dora_dist.models.assemble import assemble_llava
    from dora_dist.models.hub import fetch

    vision, language = (Path(n) if is_local(n) else fetch(n) for n in (options.vision, options.language))
    made = assemble_llava(
        vision,
        language,
        options.output,
        image_token=options.image_token,
        feature_layer=options.feature_layer,
        image_size=options.image_size,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    print(f"{options.output}: {made['tensors']} tensors; a picture is {made['tokens_per_picture']} tokens")


_DATA_FIELDS: dict[str, Any] = {"text_fields": str, "label_field": str, "cutoff_len": int, "doc_stride": int}


def _declare_evaluate(commands: Commands) -> None:
    command = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model on files: accuracy of a language model's answers, or the metrics of its own task",
        "dora-dist evaluate runs/quickstart/train --tasks boolq=boolq.json piqa=piqa.json\n"
        "          dora-dist evaluate runs/glue_sst2 --tasks sst2=dev.jsonl",
    )
    command.add_argument("model", metavar="MODEL", help="model folder, hub name, PEFT folder, checkpoint or run folder")
    command.add_argument(
        "--tasks",
        nargs="+",
        type=_task,
        required=True,
        metavar="NAME=FILE",
        help="records in the format that --format names; for a classifier, answer finder or summariser those of its "
        "training",
    )
    command.add_argument(
        "--format",
        choices=("instruction", "alpaca", "completion"),
        default="instruction",
        help="how the records become a language model's prompts, as data.format says in training (%(default)s)",
    )
    command.add_argument(
        "--mode",
        choices=("generate", "likelihood"),
        default="generate",
        help="generate: the paper's way, the first answer in the generated text; likelihood: the likeliest "
        "answer (default: %(default)s)",
    )
    command.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="records at a time (%(default)s)")
    command.add_argument(
        "--num-beams", type=_positive, metavar="N", help="beams when generating (4, or as a run that summarises has it)"
    )
    command.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="tokens to generate (32, or as a run that summarises has it)",
    )
    command.add_argument(
        "--normalise",
        choices=("sum", "mean"),
        default="sum",
        help="likelihood of the whole answer or of its average token (%(default)s)",
    )
    command.add_argument("--limit", type=_positive, metavar="N", help="only the first N records of each task")
    command.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="number format (bf16; for other models than language models the run's, or fp32)",
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="write the result there as JSON, too")
    _add_data_fields(command)


def _add_data_fields(command: argparse.ArgumentParser) -> None:
    for name, kind in _DATA_FIELDS.items():
        command.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+" if name == "text_fields" else None,
            type=kind,
            metavar="NAME" if kind is str else "N",
            help=f"data.{name} for a classifier, answer finder or summariser (the run's, or as in training)",
        )


def _evaluate(options: argparse.Namespace) -> None:
    tasks = dict(options.tasks)
    if len(tasks) < len(options.tasks):
        raise UserError(f"--tasks: a name is given twice in {', '.join(name for name, _ in options.tasks)}")
    from dora_dist.evaluation.run import as_table, evaluate

    result = evaluate(
        options.model,
        tasks,
        mode=options.mode,
        format=options.format,
        batch_size=options.batch_size,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        normalise=options.normalise,
        limit=options.limit,
        dtype=options.dtype,
        output=options.output,
        fields={name: getattr(options, name) for name in _DATA_FIELDS if getattr(options, name) is not None},
    )
    print(as_table(result))


def _declare_env(commands: Commands) -> None:
    command = _command(
        commands,
        "env",
        _env,
        "print what each rank finds: launcher, device, memory, versions, and the speed of collectives",
        "dora-dist env\n"
        "          srun dora-dist env\n"
        "          mpirun -n 2 dora-dist env\n"
        "          torchrun --nproc_per_node 2 --no-python dora-dist env\n"
        "          deepspeed --num_accelerators 2 --no_python dora-dist env",
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    command.add_argument(
        "--timeout",
        type=_positive,
        default=120,
        metavar="SECONDS",
        help="longest wait for other ranks (default: %(default)s)",
    )


def _env(options: argparse.Namespace) -> None:
    from dora_dist.environment import as_table, survey

    with redirect_stdout(sys.stderr):  # what libraries print while they start is not part of the answer
        found = survey(options.timeout)
    if found is not None:
        print(json.dumps(found, indent=2) if options.json else as_table(found))


def _command(
    commands: Commands,
    name: str,
    handler: Callable[[argparse.Namespace], None],
    summary: str,
    example: str,
    usage: str | None = None,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        usage=usage and f"dora-dist {name} {usage}",
        description=f"{summary[0].upper()}{summary[1:]}.\n\nexample:  {example}",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    command.set_defaults(handler=handler)
    return command


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=44)


def _add_output(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=f"new folder for {what}")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder if it is there already")


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _task(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, such as boolq=boolq.json")
    return name, Path(file)


def _version() -> str:
    try:
        return version("dora_dist")
    except PackageNotFoundError:
        return "(not installed)"
