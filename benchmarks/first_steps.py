"""Why a method learns as fast as it does: its first steps, kind by kind of its parameters. `--help` lists the flags.

Each method trains as in benchmarks/claims.py, on the same texts in the same order, but is asked to stop after --record
steps. Written are, for every step, the loss, how far the weights have turned (ΔD, the mean of 1 − cos over the rows of
all adapted layers), and for each kind of parameter (gates, A, B, magnitudes) the root mean squares of its numbers, of
their gradients and of what the step added to them. Finished runs are kept and not repeated. Hypotheses are variants:

    python benchmarks/first_steps.py --methods lora dynamic paper gates \\
        --variant "paper dynamic --adapter.component_init=paper --adapter.component_scale=paper" \\
        --variant "gates dynamic --adapter.component_init=paper --adapter.component_scale=paper
                   '--training.learning_rates={\\"lora_gates\\": 2e-2}'"
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from claimbench.methods import Method, with_variants
from claimbench.runs import Run, Settings, call, made, options_of
from claimbench.tasks import TASKS, Task, available, prepare
from stages import read_jsonl, set_environment

from dora_dist.analysis.decomposition import read_recordings
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.run_folder import ANALYSIS
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json

Steps = list[dict[str, Any]]
MEASURES = ("size", "gradient", "update")
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 5)))


def main(options: argparse.Namespace) -> None:
    output, packages = options.output.absolute(), options.packages.absolute()
    data = options.data and options.data.absolute()
    task = available(data)[options.task]
    set_environment()
    prepare(output, packages, [task], test=options.test, validation=options.validation)
    settings = Settings(output, options.steps, options.batch, parallel=1)
    found = {name: recorded(task, name, options.known[name], options, settings) for name in options.methods}
    place = output / f"first-steps-{options.task}"
    table = as_table(found)
    place.with_suffix(".md").write_text(table, encoding="utf-8")
    plot(found, place.with_suffix(".png"))
    print(table)
    print(f"written: {place}.md and .png; {output}/first-steps/ has every step")


def recorded(task: Task, name: str, method: Method, options: argparse.Namespace, settings: Settings) -> Steps:
    """The first steps of one run, in a process of its own; or what is known, if it was found with the same settings."""
    run = Run(task, name, method, options.r, options.rate * method.rate_factor, options.seed, "validation")
    folder, file = (
        settings.folder / "runs" / f"{run.label}-first",
        settings.folder / "first-steps" / f"{run.label}.json",
    )
    words = [*options_of(run, settings, folder), "--logging.every=1", "--analysis.every=1"]
    described = {**made(run, settings, words), "record": options.record}
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if known["made"] == described:
            steps: Steps = known["steps"]
            return steps
    print(f"{run.label} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for path in (folder, file):
        path.parent.mkdir(parents=True, exist_ok=True)
    kinds, log = folder.with_name(f"{folder.name}.jsonl"), folder.with_name(f"{folder.name}.log")
    kinds.unlink(missing_ok=True)
    recorder = [sys.executable, "-m", "claimbench.recorder", kinds, str(options.record), method.recipe]
    with log.open("w", encoding="utf-8") as out:
        call([*recorder, *words], out, log)
    steps = joined(kinds, folder, options.record)
    write_json(file, {"made": described, "steps": steps})
    shutil.rmtree(folder)
    return steps


def joined(kinds: Path, run_dir: Path, count: int) -> Steps:
    """Of the first `count` steps each: its loss, the norm of its gradient before clipping, ΔD after it, and what every
    kind of parameter did in it.
    """
    logged = run_folder.metrics(run_dir)
    own = {line["step"]: {"loss": line["loss"], "grad_norm": line["grad_norm"]} for line in logged if "loss" in line}
    turned = {
        recording.step: statistics.mean(matrix.delta_d or 0.0 for matrix in recording.matrices.values())
        for recording in read_recordings(run_dir / ANALYSIS)
    }
    steps = read_jsonl(kinds)[:count]
    return [{**step, **own[step["step"]], "delta_d": turned[step["step"]]} for step in steps]


def as_table(found: dict[str, Steps]) -> str:
    """Markdown: at a few steps, loss and ΔD of every method; then its kinds of parameters."""
    last = min(len(steps) for steps in found.values())
    shown = sorted({step for step in (1, 10, 25, last) if step <= last})
    lines = ["| | | " + " | ".join(f"step {step}" for step in shown) + " |", "|---|---|" + "---|" * len(shown)]
    for name, steps in found.items():
        at = [steps[step - 1] for step in shown]
        lines.append(f"| {name} | loss | " + " | ".join(f"{each['loss']:.3f}" for each in at) + " |")
        lines.append("| | ΔD | " + " | ".join(f"{each['delta_d']:.2e}" for each in at) + " |")
        for kind in steps[0]["kinds"]:
            for measure in MEASURES:
                cells = [f"{each['kinds'][kind][measure]:.2e}" if kind in each["kinds"] else "" for each in at]
                lines.append(f"| | {kind}, {measure} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Steps], path: Path) -> None:
    """A panel each for loss, ΔD and what is measured of parameters: colours are methods, lines kinds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(kind for steps in found.values() for each in steps for kind in each["kinds"]))
    styles = dict(zip(kinds, _STYLES * 9, strict=False))
    colours = dict(zip(found, pyplot.cm.tab10.colors * 9, strict=False))
    titles = ["loss", "ΔD", *(f"{measure} (root mean square)" for measure in MEASURES)]
    figure, axes = pyplot.subplots(1, len(titles), figsize=(4 * len(titles), 4), layout="constrained")
    for name, steps in found.items():
        for axis, field in zip(axes, ("loss", "delta_d"), strict=False):
            axis.plot([each["step"] for each in steps], [each[field] for each in steps], color=colours[name])
        for kind in kinds:
            here = [each for each in steps if kind in each["kinds"]]
            for axis, measure in zip(axes[2:], MEASURES, strict=True):
                values = [each["kinds"][kind][measure] for each in here]
                axis.plot([each["step"] for each in here], values, color=colours[name], linestyle=styles[kind])
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_yscale("linear" if title == "loss" else "log")
    axes[0].legend([Line2D([], [], color=colours[name]) for name in found], list(found), fontsize=7)
    axes[2].legend([Line2D([], [], color="0.3", linestyle=styles[kind]) for kind in kinds], kinds, fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError for names that nothing has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", default="sarcasm", help=f"{', '.join(TASKS)}, or one of --data (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=["lora", "dynamic"], help="(%(default)s), or variants")
    parser.add_argument(
        "--variant", action="append", default=[], metavar='"NAME METHOD --section.field=VALUE ..."', help="repeatable"
    )
    parser.add_argument("--record", type=int, default=50, help="steps to record (%(default)s)")
    parser.add_argument("--steps", type=int, default=175, help="steps that the whole run would have (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="texts a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, as in claims.py (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--r", type=int, default=16, help="components of a LoRA's layer (%(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="texts set apart, as in claims.py (%(default)s)")
    parser.add_argument("--validation", type=int, default=800, help="(%(default)s)")
    parser.add_argument("--data", type=Path, help="folder with further tasks, as in claims.py")
    parser.add_argument("--packages", type=Path, default=Path("runs/quickstart/cache"), help="folder for downloads")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-claims"), help="that of claims.py will do")
    options = parser.parse_args(words)
    options.known = with_variants(options.variant)
    options.methods = list(dict.fromkeys(options.methods))
    for field, names, known in (
        ("--methods", options.methods, options.known),
        ("--task", [options.task], available(options.data)),
    ):
        if strangers := [name for name in names if name not in known]:
            raise UserError(f"{field} {strangers[0]}: is none of {', '.join(known)}")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"error: {error}")
