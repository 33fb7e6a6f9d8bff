"""`dora-dist export`: a trained adapter in the form that another program takes."""

import argparse
from pathlib import Path
from typing import Any

from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import DTYPES, Commands, add_output, add_plugins, declare, positive
from dora_dist.runtime import plugins
from dora_dist.runtime.console import say

_WORST = 5  # modules whose error is shown


def declare_export(commands: Commands) -> None:
    command = declare(
        commands,
        "export",
        _export,
        summary="write an adapter as a plain LoRA, for servers that read no other, and measure what that loses",
        example="dora-dist export runs/mine --to lora --rank 64 --output lora/",
    )
    command.add_argument("path", type=Path, metavar="PATH", help="run folder, checkpoint, or adapter folder")
    command.add_argument("--to", choices=("lora",), required=True, help="lora: the nearest LoRA of --rank")
    add_output(command, "the result")
    command.add_argument("--base", metavar="MODEL", help="base model folder or hub name (default: the run's own)")
    command.add_argument("--rank", type=positive, default=64, metavar="R", help="rank of the LoRA (%(default)s)")
    command.add_argument(
        "--max-error",
        type=float,
        default=0.3,
        metavar="E",
        help="refuse to lose more than this share of the adapter's effect on the logits (%(default)s)",
    )
    command.add_argument("--force", action="store_true", help="write it whatever it loses")
    command.add_argument(
        "--no-logits", action="store_true", help="load no model; --max-error is then of the weights' change"
    )
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the logits (default: %(default)s)")
    add_plugins(command)


def _export(options: argparse.Namespace) -> None:
    plugins.load(options.plugins, "--plugins")
    from dora_dist.evaluation.export_lora import export_lora

    with ended_by_signals():
        result = export_lora(
            options.path,
            options.output,
            r=options.rank,
            base=options.base,
            max_error=options.max_error,
            force=options.force,
            logits=not options.no_logits,
            dtype=options.dtype,
            overwrite=options.overwrite,
        )
    say(_told(result))


def _told(result: dict[str, Any]) -> str:
    errors = sorted(result["errors"].items(), key=lambda pair: -pair[1])
    width = max(len(name) for name, _ in errors)
    lines = [f"{'module':<{width}}  share of its change that is lost"]
    lines += [f"{name:<{width}}  {error:.2%}" for name, error in errors[:_WORST]]
    if len(errors) > _WORST:
        lines.append(f"... and {len(errors) - _WORST:,} modules that lose less")
    lines.append(f"{'all weights':<{width}}  {result['error']:.2%}")
    if (logits := result["logits"]) is not None:
        lines.append(
            f"{'logits':<{width}}  {logits['lost']:.2%}; {logits['agreement']:.1%} of likeliest tokens are the same"
        )
    return "\n".join([*lines, f"{result['output']}: LoRA of rank {result['r']} for {result['modules']:,} modules"])
