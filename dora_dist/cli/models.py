"""Commands that make folders of models and adapters: `consolidate`, `export-peft`, `import-gguf`, `assemble-llava`."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from dora_dist.checkpoint import run_folder
from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import DTYPES, Commands, add_output, add_plugins, declare, positive, size
from dora_dist.runtime import plugins
from dora_dist.runtime.console import say


def declare_consolidate(commands: Commands) -> None:
    command = declare(
        commands,
        "consolidate",
        _consolidate,
        summary="merge an adapter into its base: a plain Hugging Face model folder",
        example="dora-dist consolidate runs/quickstart/train --output merged/",
    )
    _add_adapter(command, "the merged model")
    command.add_argument("--dtype", choices=DTYPES, help="number format to write (default: the base's)")
    command.add_argument(
        "--base-precision",
        choices=("trained", "original"),
        default="trained",
        help="of a run with a quantised base: merge into the weights as training saw them, or into the base's own, and "
        "say how far the two results are apart (default: %(default)s)",
    )
    command.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="largest file (default: %(default)s)",
    )
    add_plugins(command)


def _consolidate(options: argparse.Namespace) -> None:
    from dora_dist.checkpoint.consolidate import consolidate

    adapter, base = _adapter_and_base(options, "merging", "consolidate")
    with ended_by_signals():
        result = consolidate(
            adapter,
            base,
            options.output,
            dtype=options.dtype,
            base_precision=options.base_precision,
            max_shard_bytes=options.max_shard_size,
            overwrite=options.overwrite,
        )
    if options.base_precision == "original":
        _say_differences(result["differences"])
    replaced = f"{result['replaced']} replaced, " if result["replaced"] else ""
    say(
        f"{options.output}: {result['merged']} of {result['tensors']} tensors merged, {replaced}"
        f"{result['bytes_written'] / 1e9:.3f} GB written in {result['seconds']:.1f} s"
    )


def _say_differences(differences: Mapping[str, float]) -> None:
    """How far a merge into the base's own weights is from what training saw: the largest of each layer."""
    largest: dict[str, tuple[float, str]] = {}
    for name, difference in differences.items():
        largest[_layer_of(name)] = max(largest.get(_layer_of(name), (0.0, "")), (difference, name))
    for difference, name in largest.values():
        say(f"{name}: differs by {difference:.2%} from what training saw")
    if not differences:
        say("the base was not quantised in training: nothing differs from what training saw")


def _layer_of(tensor: str) -> str:
    """The numbered layer of a tensor's name: "model.layers.3"."""
    steps = tensor.split(".")
    last = max((place for place, step in enumerate(steps) if step.isdigit()), default=len(steps) - 1)
    return ".".join(steps[: last + 1])


def declare_export_peft(commands: Commands) -> None:
    command = declare(
        commands,
        "export-peft",
        _export_peft,
        summary="write an adapter of our own format (DVoRA's) as a PEFT folder",
        example="dora-dist export-peft runs/dvora --output adapter/",
    )
    _add_adapter(command, "PEFT's adapter")
    add_plugins(command)


def _export_peft(options: argparse.Namespace) -> None:
    from dora_dist.checkpoint.export import export_peft

    adapter, base = _adapter_and_base(options, "exporting", "export-peft")
    with ended_by_signals():
        modules = export_peft(adapter, base, options.output, overwrite=options.overwrite)
    say(f"{options.output}: {modules} modules")


def _add_adapter(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("path", type=Path, metavar="PATH", help="run folder, checkpoint, or adapter folder")
    add_output(command, what)
    command.add_argument("--base", metavar="MODEL", help="base model folder or hub name (default: the run's own)")


def _adapter_and_base(options: argparse.Namespace, doing: str, command: str) -> tuple[Path, str]:
    """The adapter's folder and its base, for a command that says what it is `doing` with a run's checkpoint."""
    from dora_dist.checkpoint.adapter_folders import adapter_and_base

    plugins.load(options.plugins, "--plugins")
    found = adapter_and_base(options.path, options.base)
    if (choice := run_folder.chosen(options.path)) is not None:
        print(f"{doing} {choice.told(f'{command} {{}} --output {options.output}')}")
    return found


def declare_import_gguf(commands: Commands) -> None:
    command = declare(
        commands,
        "import-gguf",
        _import_gguf,
        summary="convert a GGUF file to a Hugging Face model folder, once",
        example="dora-dist import-gguf SmolLM2-135M-Instruct.gguf --output base/",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="GGUF file")
    add_output(command, "the model")
    command.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="number format to write (default: %(default)s)"
    )


def _import_gguf(options: argparse.Namespace) -> None:
    from dora_dist.models.gguf import import_gguf

    with ended_by_signals():
        import_gguf(options.file, options.output, dtype=options.dtype, overwrite=options.overwrite)
    say(str(options.output))


def declare_assemble_llava(commands: Commands) -> None:
    command = declare(
        commands,
        "assemble-llava",
        _assemble_llava,
        summary="make a LLaVA of a vision tower and a language model, with a fresh projector",
        example="dora-dist assemble-llava --vision clip/ --language vicuna/ --output llava/",
    )
    command.add_argument("--vision", required=True, metavar="MODEL", help="vision tower: folder or hub name")
    command.add_argument("--language", required=True, metavar="MODEL", help="language model: folder or hub name")
    add_output(command, "the LLaVA")
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
        "--image-size", type=positive, metavar="PIXELS", help="side length of pictures (default: the tower's)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the projector (%(default)s)")


def _assemble_llava(options: argparse.Namespace) -> None:
    from dora_dist.config import is_local
    from dora_dist.models.llava.assemble import assemble_llava
    from dora_dist.runtime.hub import fetch

    vision, language = (Path(n) if is_local(n) else fetch(n) for n in (options.vision, options.language))
    with ended_by_signals():
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
    say(f"{options.output}: {made['tensors']} tensors; a picture is {made['tokens_per_picture']} tokens")
