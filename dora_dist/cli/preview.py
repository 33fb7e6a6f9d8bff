"""Tokenized data for a person: figures, and two samples with what is learnt of them marked."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dora_dist.data import TokenizedData
from dora_dist.data.preview import MOST_NAMED, Figures, Part, Preview, percentiles, segments
from dora_dist.data.sampler import batches_of
from dora_dist.runtime.console import visible

OPEN, CLOSE = "[[", "]]"
"""Around what is learnt, where colours cannot be shown."""
LEARNT, SPECIAL = "bold green", "reverse"
HEAD, AROUND, TAIL = 10, 5, 10
"""Lines of a long text that are shown: the first, those around where learning starts, the last."""


def show(
    data: TokenizedData,
    tokenizer: Any,
    *,
    title: str,
    steps: int,
    batch: int,
    rows: str | None = None,
    counted: bool = True,
) -> None:
    """Print figures of the data, the length of a run of `steps` steps of `batch` records each, and two samples.

    rows: how the records of a step share rows, where they do. counted: whether an epoch's records are.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    _print_figures(console, data, title)
    samples = data.train
    an_epoch = batches_of(samples.parts.values(), batch)
    epochs = f", {an_epoch:,} steps an epoch: {steps / an_epoch:,.1f} epochs" if counted else " of a stream"
    console.print(f"\n{steps:,} steps of {batch} records{epochs}")
    for share in samples.shares:
        console.print(f"  {share}", soft_wrap=True)
    if rows is not None:
        console.print(rows, soft_wrap=True)
    for title, position in samples.shown().items():
        _print_sample(console, tokenizer, samples.preview(position), title=title)
    console.print()
    marked = "in green; special tokens are reversed" if _in_colour(console) else f"between {OPEN} and {CLOSE}"
    console.print(f"Learnt is what is {marked}. The rest is read only.")


def _print_figures(console: Console, data: TokenizedData, title: str) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title)
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


def _print_sample(console: Console, tokenizer: Any, sample: Preview, *, title: str) -> None:
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


def _in_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _marked(part: Part, tokenizer: Any, colours: bool) -> Text:
    """The text of a part, what is learnt in colour or between OPEN and CLOSE."""
    text, was_learnt = Text(), False
    for piece, learnt, special in segments(part, tokenizer):
        if learnt != was_learnt and not colours:
            text.append(OPEN if learnt else CLOSE, LEARNT)
        style = [LEARNT] * learnt + [SPECIAL] * special
        text.append(visible(piece), " ".join(style))
        was_learnt = learnt
    if was_learnt and not colours:
        text.append(CLOSE, LEARNT)
    return text


def _shortened(lines: Sequence[Text]) -> Iterator[Text]:
    """The beginning and the end of a text, and where learning starts in between."""
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
