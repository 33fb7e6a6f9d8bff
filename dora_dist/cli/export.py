"""`dora-dist export`: what was trained, in the form that another program takes."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.checkpoint import run_folder
from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import DTYPES, Commands, add_plugins, declare, positive
from dora_dist.runtime import plugins
from dora_dist.runtime.console import say
from dora_dist.runtime.errors import UserError

RANK, MAX_ERROR = 64, 0.3
TYPES, TYPE = ("f32", "f16", "bf16", "q8_0"), "f16"
_WORST = 5  # modules whose error is shown


@dataclass(frozen=True)
class _Form:
    """What --to names. own: options that have a meaning with it alone, which `declare` adds to a group; they are None
    where they are not given, so that those of another form can be refused.
    """

    help: str
    own: tuple[str, ...]
    declare: Callable[[Any], None]
    write: Callable[[argparse.Namespace], None]


def declare_export(commands: Commands) -> None:
    command = declare(
        commands,
        "export",
        _export,
        summary="write an adapter as a plain LoRA, for servers that read no other, and measure what that loses; or the "
        "merged model as a GGUF file, for llama.cpp",
        example="dora-dist export runs/mine --to lora --rank 64 --output lora/\n"
        "          dora-dist export runs/mine --to gguf --output mine.gguf",
    )
    command.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="run, checkpoint, or adapter folder; for gguf also a merged model",
    )
    told = "; ".join(f"{name}: {form.help}" for name, form in _FORMS.items())
    command.add_argument("--to", choices=tuple(_FORMS), required=True, help=told)
    command.add_argument(
        "--output", type=Path, required=True, metavar="PATH", help="new folder for the LoRA, or new GGUF file"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output if it is there already")
    command.add_argument("--base", metavar="MODEL", help="base model folder or hub name (default: the run's own)")
    add_plugins(command)
    for name, form in _FORMS.items():
        form.declare(command.add_argument_group(f"for --to {name}"))


def _lora_options(group: Any) -> None:
    group.add_argument("--rank", type=positive, metavar="R", help=f"rank of the LoRA ({RANK})")
    group.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help=f"refuse to lose more than this share of the adapter's effect on the logits ({MAX_ERROR})",
    )
    group.add_argument("--force", action="store_true", default=None, help="write it whatever it loses")
    group.add_argument(
        "--no-logits",
        action="store_true",
        default=None,
        help="load no model; --max-error is then of the weights' change",
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the logits (default: fp32)")


def _gguf_options(group: Any) -> None:
    group.add_argument("--type", choices=TYPES, help=f"number format of the weights (default: {TYPE})")


def _export(options: argparse.Namespace) -> None:
    plugins.load(options.plugins, "--plugins")
    for name, form in _FORMS.items():
        given = [option for option in form.own if getattr(options, option) is not None]
        if given and name != options.to:
            flag = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{flag}: is for --to {name}, and has no meaning with --to {options.to}; leave it out")
    _FORMS[options.to].write(options)


def _lora(options: argparse.Namespace) -> None:
    from dora_dist.evaluation.export_lora import export_lora

    with ended_by_signals():
        result = export_lora(
            options.path,
            options.output,
            r=options.rank or RANK,
            base=options.base,
            max_error=MAX_ERROR if options.max_error is None else options.max_error,
            force=bool(options.force),
            logits=not options.no_logits,
            dtype=options.dtype or "fp32",
            overwrite=options.overwrite,
        )
    say(_told(result))


def _gguf(options: argparse.Namespace) -> None:
    from dora_dist.checkpoint.export_gguf import export_gguf

    if (choice := run_folder.chosen(options.path)) is not None:
        print(f"merging {choice.told(f'export {{}} --to gguf --output {options.output}')}")
    with ended_by_signals():
        result = export_gguf(
            options.path,
            options.output,
            gguf_type=options.type or TYPE,
            base=options.base,
            overwrite=options.overwrite,
        )
    if result["in_f16"]:
        say(f"{len(result['in_f16']):,} weights are f16: their rows are not a multiple of 32, as q8_0 needs")
    say(
        f"{options.output}: {result['merged']} of {result['tensors']} tensors merged, "
        f"{result['bytes_written'] / 1e9:.3f} GB written"
    )


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


_FORMS = {
    "lora": _Form(
        "the nearest LoRA of --rank", ("rank", "max_error", "force", "no_logits", "dtype"), _lora_options, _lora
    ),
    "gguf": _Form("a merged model", ("type",), _gguf_options, _gguf),
}
