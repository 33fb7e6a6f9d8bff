"""The claims of both DoRA papers on real text: methods, tasks, seeds, learning rates. `--help` lists the flags.

SmolLM2-135M learns questions with answers to choose from (sarcasm, socialiqa, quartz), MiniLM whether texts are liked
(snippets, news, tweets, reviews). Compared are LoRA, DoRA, dynamic rank, both together, DVoRA, MoRA and full
fine-tuning: those with a size at the numbers that a LoRA of --r trains (dynamic rank at its end), and at half. Each
method gets its own learning rate: the best of --rates on validation texts, with seeds of its own, for each task, but
none at which, or at up to twice which, a run learnt nothing; where the best is the lowest or highest, the next beyond
it is tried as well. Test texts are asked once, of runs with other seeds. The runs of one seed and task see the same
texts in the same order, so that methods can be compared seed by seed and text by text.

Each run has one core, two run at a time. Finished runs are kept as JSON and not repeated; one that was interrupted
starts again. --variant adds a method with other settings to all tables, such as
"paper dynamic --adapter.component_init=paper --adapter.component_scale=paper".
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from claimbench.methods import METHODS, REFERENCE, Method, with_variants
from claimbench.packages import ENCODERS
from claimbench.rates import Sweep
from claimbench.report import Found, Row, plot, tables
from claimbench.runs import Run, Settings, baseline, least, results
from claimbench.tasks import TASKS, Task, available, prepare
from stages import set_environment

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json


def main(options: argparse.Namespace) -> None:
    output, packages = options.output.absolute(), options.packages.absolute()
    methods = {name: options.known[name] for name in options.methods}
    tasks = chosen(options)
    set_environment()
    prepare(output, packages, tasks, test=options.test, validation=options.validation)
    settings = Settings(output, options.steps, options.batch, options.parallel)
    sweeps = sweep(tasks, methods, options, settings)
    finals = [
        run
        for (task, name), rates in sweeps.items()
        for r in sizes(methods[name], options.r, half=name in options.half)
        for run in _runs(task, name, methods[name], r, _rate(rates, methods[name], options), options.seeds)
    ]
    named = {(task.name, name): rates.means for (task, name), rates in sweeps.items()}
    found = Found(settings, methods, options.r, list(options.seeds), named)
    found.baselines = {task.name: baseline(task, settings) for task in tasks}
    found.steps = {task.name: options.steps * task.longer for task in tasks}
    for run, result in results(finals, settings).items():
        row = found.rows.setdefault((run.task.name, run.name, run.r), Row(run.rate))
        row.add(result)
    table = tables(found)
    (output / "claims.md").write_text(table, encoding="utf-8")
    write_json(output / "claims.json", found.as_json())
    plot(found, output / "claims.png")
    print(table)
    print(f"written: {output}/claims.md, .json and .png; results/ has every run")


def chosen(options: argparse.Namespace) -> list[Task]:
    """The tasks that are named, those of texts by the encoder that is."""
    known = available(options.data and options.data.absolute())
    found = [known[name] for name in options.tasks]
    return [replace(task, model=options.encoder) if task.model in ENCODERS else task for task in found]


def sweep(
    tasks: Sequence[Task], methods: Mapping[str, Method], options: argparse.Namespace, settings: Settings
) -> Mapping[tuple[Task, str], Sweep]:
    """Validation runs by task and method; more, until none has its best rate at an end.

    Nothing is tried where options.rates is a single one.
    """
    tried = {(task, name): Sweep(least(task, settings)) for task in tasks for name in methods}
    if len(options.rates) == 1:
        return tried
    wanted = {key: [rate * methods[key[1]].rate_factor for rate in options.rates] for key in tried}
    for _ in range(1 + options.extend):
        runs = [
            Run(task, name, methods[name], options.r, rate, seed, "validation")
            for (task, name), rates in wanted.items()
            for rate in rates
            for seed in options.sweep_seeds
        ]
        for run, result in results(runs, settings).items():
            tried[run.task, run.name].add(run.rate, result["accuracy"])
        wanted = {key: rates.beyond() for key, rates in tried.items()}
    return tried


def _rate(rates: Sweep, method: Method, options: argparse.Namespace) -> float:
    """The best that was tried, or the only one that there is."""
    return rates.best() if rates.runs else options.rates[0] * method.rate_factor


def sizes(method: Method, r: int, *, half: bool) -> list[int]:
    return [r, r // 2] if method.sized and half and r > 1 else [r]


def _runs(task: Task, name: str, method: Method, r: int, rate: float, seeds: Iterable[int]) -> list[Run]:
    return [Run(task, name, method, r, rate, seed, "test") for seed in seeds]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["sarcasm", "socialiqa", "snippets"], help=f"of {', '.join(TASKS)}, and of --data"
    )
    parser.add_argument("--methods", nargs="+", help=f"default: {' '.join(METHODS)}, and all variants")
    parser.add_argument(
        "--variant", action="append", default=[], metavar='"NAME METHOD --section.field=VALUE ..."', help="repeatable"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the test runs (%(default)s)")
    parser.add_argument(
        "--sweep-seeds",
        nargs="+",
        type=int,
        default=[0, 10],
        help="of the runs that choose learning rates (%(default)s)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[5e-4, 1e-3, 2e-3, 4e-3],
        help="learning rates of LoRA and of methods alike; full fine-tuning's are 1/16, DVoRA's 8 times as high",
    )
    parser.add_argument("--extend", type=int, default=3, help="most rates tried beyond those (%(default)s)")
    parser.add_argument("--r", type=int, default=16, help="components of a LoRA's layer (%(default)s)")
    parser.add_argument(
        "--half", nargs="*", metavar="METHOD", help="which are run at half the size, too (all that have one)"
    )
    parser.add_argument(
        "--steps", type=int, default=120, help="optimizer steps of a run, twice for MiniLM (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="texts a step (%(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="most test texts of a task (%(default)s)")
    parser.add_argument("--validation", type=int, default=800, help="most validation texts (%(default)s)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, of one core each (%(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with further questions: NAME.json or NAME.train.json, records as Liu et al. train on",
    )
    parser.add_argument("--encoder", choices=ENCODERS, default="minilm", help="what learns sentiment (%(default)s)")
    parser.add_argument("--packages", type=Path, default=Path("runs/quickstart/cache"), help="folder for downloads")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-claims"), help="texts, runs and tables")
    return parser


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError for names that nothing has."""
    options = _parser().parse_args(words)
    options.known = with_variants(options.variant)
    options.methods = list(dict.fromkeys(options.methods or options.known))
    options.half = options.methods if options.half is None else options.half
    for field, names, known in (
        ("--methods", options.methods, options.known),
        ("--half", options.half, options.methods),
        ("--tasks", options.tasks, available(options.data)),
    ):
        if strangers := [name for name in names if name not in known]:
            raise UserError(f"{field} {strangers[0]}: is none of {', '.join(known)}")
    if REFERENCE not in options.methods:
        raise UserError(f"--methods: {REFERENCE} is missing, which all others are compared with")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"error: {error}")
