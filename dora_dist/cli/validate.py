"""`dora-dist validate`: what can be said of a run without starting it; with --data, what it would learn."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.cli.options import Commands, declare, positive
from dora_dist.config import RunConfig, add_arguments, deepspeed_options
from dora_dist.tasks import problems, task_named

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from dora_dist.data import TokenizedData
    from dora_dist.data.preview import Figures, Part, Preview

OPEN, CLOSE = "[[", "]]"
"""Around what is learnt, where colours cannot be shown."""
LEARNT, SPECIAL = "bold green", "reverse"
HEAD, AROUND, TAIL = 10, 5, 10
"""Lines of a long text that are shown: the first, those around where learning starts, the last."""
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | dict.fromkeys(range(127, 160), 9249)
"""Control characters, which a terminal would obey, to signs for them."""


def declare_validate(commands: Commands) -> None:
    command = declare(
        commands,
        "validate",
        _validate,
        summary="check a config file, and the files that it names, without starting anything",
        example="dora-dist validate configs/llama7b_dora.json --data --data.train mine.jsonl",
        usage="CONFIG [--data] [--world-size N] [--no-files] [--SECTION.FIELD VALUE ...]",
    )
    command.add_argument("config", metavar="CONFIG", help="JSON file that describes the run")
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
    if config.engine.deepspeed:
        deepspeed_options.check(config.engine.deepspeed)
    if options.world_size is not None:
        print(json.dumps(config.deepspeed_config(options.world_size), indent=2))
    if config.adapter.dynamic_rank and config.training.max_steps is not None:
        from dora_dist.training.run import pruning_budget

        pruning_budget(config, config.training.max_steps)
    if options.data:
        show_data(config)
    adapter, training = config.adapter, config.training
    most = training.global_batch_size
    evenly = ", ".join(str(count) for count in range(1, most + 1) if config.training.batch_plan(count).empty == 0)
    print(
        f"{options.config} is valid: {'DoRA' if adapter.weight_decomposed else 'LoRA'} r={adapter.r} on "
        f"{config.model.path}, {training.global_batch_size} records a step; runs on "
        f"{f'1 to {most} ranks (evenly on {evenly})' if most > 1 else '1 rank'}; writes {config.checkpoint.run_dir}",
        file=sys.stderr,
    )


def show_data(config: RunConfig) -> None:
    """Print figures of a run's data, read as training reads it, and two samples of it. Raises UserError as that does.

    Of the base only the tokenizer and the configuration are needed.
    """
    from rich.console import Console

    from dora_dist.checkpoint.resuming import optimizer_steps
    from dora_dist.data.preview import longest
    from dora_dist.training.inputs import fetched_for_data, read_data
    from dora_dist.training.run import pruning_budget

    local = fetched_for_data(config)
    processor, data = read_data(local, Path(local.model.path), progress=True)
    tokenizer = task_named(config.model.task).tokenizer(processor)
    steps = optimizer_steps(config, len(data.train))
    pruning_budget(config, steps)
    console = Console(highlight=False, markup=False, emoji=False)
    _print_figures(console, config, data, steps)
    _print_sample(console, tokenizer, data.train.preview(0), "first")
    if second := longest(data.train.token_counts()):
        _print_sample(console, tokenizer, data.train.preview(second), "longest")
    elif len(data.train) > 1:
        _print_sample(console, tokenizer, data.train.preview(len(data.train) - 1), "last")
    console.print()
    marked = "in green; special tokens are reversed" if _in_colour(console) else f"between {OPEN} and {CLOSE}"
    console.print(f"Learnt is what is {marked}. The rest is read only.")


def _print_figures(console: "Console", config: RunConfig, data: "TokenizedData", steps: int) -> None:
    from rich.table import Table

    from dora_dist.data.preview import MOST_NAMED, percentiles

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"{config.data.format} records")
    sets = [("training", data.train, data.train_stats)]
    if data.validation is not None and data.validation_stats is not None:
        sets.append(("validation", data.validation, data.validation_stats))
    columns: list[Figures] = []
    for name, dataset, stats in sets:
        table.add_column(name, justify="right")
        figures = stats.figures()
        for what, counts in dataset.token_counts().items():
            figures |= percentiles(what, counts)
        columns.append(figures)
    for row in columns[0]:
        table.add_row(row, *(figures.get(row, "") for figures in columns))
    console.print(table)
    for name, _, stats in sets:
        for what, numbers in (("cut", stats.first_cut), ("left out", stats.first_left_out)):
            if numbers:
                more = " and others" if len(numbers) == MOST_NAMED else ""
                console.print(f"{name}, {what}: records {', '.join(map(str, numbers))}{more}")
    batch = config.training.global_batch_size
    an_epoch = math.ceil(len(data.train) / batch)
    console.print(f"\n{steps:,} steps of {batch} records, {an_epoch:,} steps an epoch: {steps / an_epoch:,.1f} epochs")


def _print_sample(console: "Console", tokenizer: Any, sample: "Preview", title: str) -> None:
    """A sample's texts with what is learnt marked, behind a line at the left."""
    console.print(f"\n{title} sample: record {sample.record:,}, {sample.tokens:,} tokens", style="bold")
    for name, fact in sample.facts.items():
        console.print(f"  {name}: {fact}", soft_wrap=True)
    for part in sample.parts:
        if part.name:
            console.print(f"  {part.name}:")
        lines = list(_marked(part, tokenizer, _in_colour(console)).wrap(console, console.width - 4))
        for line in _shortened(lines):
            console.print("  │ ", line, sep="", end="\n")


def _in_colour(console: "Console") -> bool:
    return console.color_system is not None and not console.no_color


def _marked(part: "Part", tokenizer: Any, colours: bool) -> "Text":
    """The text of a part, what is learnt in colour or between OPEN and CLOSE."""
    from rich.text import Text

    from dora_dist.data.preview import segments

    text, was_learnt = Text(), False
    for piece, learnt, special in segments(part, tokenizer):
        if learnt != was_learnt and not colours:
            text.append(OPEN if learnt else CLOSE, LEARNT)
        style = [LEARNT] * learnt + [SPECIAL] * special
        text.append(piece.translate(_VISIBLE), " ".join(style))
        was_learnt = learnt
    if was_learnt and not colours:
        text.append(CLOSE, LEARNT)
    return text


def _shortened(lines: "Sequence[Text]") -> "Iterator[Text]":
    """The beginning and the end of a text, and where learning starts in between."""
    from rich.text import Text

    starts = (i for i, line in enumerate(lines) if any(LEARNT in str(span.style) for span in line.spans))
    start = next(starts, 0)
    kept = {*range(HEAD), *range(start - AROUND, start + AROUND), *range(len(lines) - TAIL, len(lines))}
    hidden = 0
    for i, line in enumerate(lines):
        if i in kept:
            if hidden:
                yield Text(f"... {hidden:,} lines ...", "dim")
            yield line
        hidden = 0 if i in kept else hidden + 1
