"""`dora-dist evaluate`."""

import argparse
from pathlib import Path
from typing import Any

from dora_dist.cli.options import DTYPES, Commands, declare, positive
from dora_dist.errors import UserError

_DATA_FIELDS: dict[str, Any] = {"text_fields": str, "label_field": str, "cutoff_len": int, "doc_stride": int}


def declare_evaluate(commands: Commands) -> None:
    command = declare(
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
    command.add_argument("--batch-size", type=positive, default=8, metavar="N", help="records at a time (%(default)s)")
    command.add_argument(
        "--num-beams", type=positive, metavar="N", help="beams when generating (4, or as a run that summarises has it)"
    )
    command.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens to generate (32, or as a run that summarises has it)",
    )
    command.add_argument(
        "--normalise",
        choices=("sum", "mean"),
        default="sum",
        help="likelihood of the whole answer or of its average token (%(default)s)",
    )
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N records of each task")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
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


def _task(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, such as boolq=boolq.json")
    return name, Path(file)
