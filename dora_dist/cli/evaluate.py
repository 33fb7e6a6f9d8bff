"""`dora-dist evaluate`."""

import argparse
from pathlib import Path

from dora_dist.checkpoint import run_folder
from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import DTYPES, Commands, add_plugins, declare, positive
from dora_dist.config import RunConfig
from dora_dist.config.fields import field_specs
from dora_dist.runtime import plugins
from dora_dist.runtime.console import note, say
from dora_dist.runtime.errors import UserError

_LABELLED = "a classifier, answer finder or summariser"
_DATA_FIELDS = {
    **dict.fromkeys(("text_fields", "label_field", "cutoff_len", "doc_stride"), _LABELLED),
    **dict.fromkeys(("features", "bad_images"), "a VL-BART"),
    **dict.fromkeys(("image_folder", "image_aspect_ratio", "max_image_pixels", "chat_template"), "a LLaVA"),
}

_SETTINGS = (
    "mode",
    "format",
    "instruction",
    "normalise",
    "num_beams",
    "max_new_tokens",
    "batch_size",
    "limit",
    "dtype",
)


def declare_evaluate(commands: Commands) -> None:
    command = declare(
        commands,
        "evaluate",
        _evaluate,
        summary="measure a model on files: accuracy of a language model's answers, a LLaVA's answers about pictures, "
        "or the metrics of the model's own task",
        example="dora-dist evaluate runs/quickstart/train --tasks boolq=boolq.json piqa=piqa.json\n"
        "          dora-dist evaluate runs/glue_sst2 --tasks sst2=dev.jsonl\n"
        "          dora-dist evaluate runs/llava7b_dora --tasks vqav2=vqa.jsonl --image-folder val2014",
    )
    command.add_argument(
        "model", metavar="MODEL", help="model folder, hub name, adapter folder, checkpoint or run folder"
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        type=_task,
        required=True,
        metavar="NAME=FILE",
        help="records in the format that --format names; for a classifier, answer finder, summariser or VL-BART those "
        "of its training (VL-BART: NAME is the task, such as vqa)",
    )
    command.add_argument(
        "--format",
        choices=("instruction", "alpaca", "completion", "messages", "vqa", "multiple_choice", "pope", "captions"),
        help="how the records become a language model's prompts, as data.format says in training (default: the run's, "
        "else instruction): instruction, alpaca, completion, messages (chats: the last assistant turn is the "
        "reference); or what a LLaVA is asked: vqa (the default; text, image, answers), "
        "multiple_choice (text, image, choices, answer), pope (text, image, label), captions (image, captions)",
    )
    command.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what follows each question to a LLaVA (what LLaVA-1.5 was trained with for the format); '' for nothing",
    )
    command.add_argument(
        "--mode",
        choices=("generate", "likelihood", "loss"),
        help="generate: read the answer from generated text (instruction records of the eight commonsense tasks: its "
        "first answer word, such as true or solution1; other records: the whole text, compared with the reference, "
        "whose loss is given, too); likelihood: the likeliest of the candidates; loss: loss and perplexity of the "
        "references alone (default: generate)",
    )
    command.add_argument(
        "--base", metavar="MODEL", help="base model folder or hub name of an adapter (default: the run's own)"
    )
    _add_search(command)
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N records of each task")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="number format (bf16 for a language model; for others the run's; else bf16 for a LLaVA, fp32)",
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="write the result there as JSON, too")
    _add_data_fields(command)
    add_plugins(command)


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch-size", type=positive, default=8, metavar="N", help="records at a time (%(default)s)")
    command.add_argument(
        "--num-beams",
        type=positive,
        metavar="N",
        help="beams when generating (4 for commonsense tasks, else 1; or as a run that summarises has it)",
    )
    command.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens to generate (32 for commonsense tasks, else as the longest reference needs; a LLaVA: 16, "
        "captions 64; or as a run that summarises has it)",
    )
    command.add_argument(
        "--normalise",
        choices=("sum", "mean"),
        help="likelihood of the whole answer or of its average token (sum)",
    )


def _add_data_fields(command: argparse.ArgumentParser) -> None:
    specs = field_specs(RunConfig)
    for name, model in _DATA_FIELDS.items():
        kind = specs[f"data.{name}"].kinds[0]
        number = kind["type"] == "integer"
        command.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+" if kind["type"] == "array" else None,
            type=int if number else str,
            choices=kind.get("enum"),
            metavar=None if "enum" in kind else "N" if number else "NAME",
            help=f"data.{name} for {model} (the run's, or as in training)",
        )


def _evaluate(options: argparse.Namespace) -> None:
    tasks = dict(options.tasks)
    if len(tasks) < len(options.tasks):
        raise UserError(f"--tasks: a name is given twice in {', '.join(name for name, _ in options.tasks)}")
    plugins.load(options.plugins, "--plugins")
    from dora_dist.evaluation.results import as_table, check_output, write_result
    from dora_dist.evaluation.run import evaluate

    if options.output is not None:
        check_output(options.output)
    if (choice := run_folder.chosen(Path(options.model))) is not None:
        note(f"evaluating {choice.told('evaluate {} --tasks ...')}")
    fields = {name: getattr(options, name) for name in _DATA_FIELDS if getattr(options, name) is not None}
    settings = {name: getattr(options, name) for name in _SETTINGS}
    with ended_by_signals():
        result = evaluate(options.model, tasks, base=options.base, fields=fields, **settings)
        say(as_table(result))  # first: a file that cannot be written must not take it along
        if options.output is not None:
            write_result(result, options.output)


def _task(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, such as boolq=boolq.json")
    return name, Path(file)
