"""`dora-dist push`: a result to the hub."""

import argparse
import json
from pathlib import Path

from dora_dist.checkpoint import run_folder
from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import Commands, declare
from dora_dist.config.names import OWN_ADAPTER, PEFT_ADAPTER, is_local
from dora_dist.runtime.console import note, say
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import read_json_object
from dora_dist.runtime.hub_upload import files_to_push, push

_BASES = {PEFT_ADAPTER: "base_model_name_or_path", OWN_ADAPTER: "base_model"}
"""Which field of an adapter's configuration names its base."""


def declare_push(commands: Commands) -> None:
    command = declare(
        commands,
        "push",
        _push,
        summary="upload an adapter folder or a merged folder to the model hub: weights, configuration, tokenizer and "
        "model card, and nothing else",
        example="dora-dist push merged/ org/name --dry-run",
    )
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="adapter or merged folder; of a run or a checkpoint, its adapter's"
    )
    command.add_argument("repository", metavar="REPO", help="repository of the hub, ORG/NAME; made if it is not there")
    command.add_argument(
        "--base",
        metavar="ORG/NAME",
        help="of an adapter: its base on the hub, where it was trained from a folder here, whose path stays here",
    )
    command.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    command.add_argument("--message", metavar="TEXT", help="of the commit")
    command.add_argument("--dry-run", action="store_true", help="list the files, and upload nothing")


def _push(options: argparse.Namespace) -> None:
    folder = _folder(options.folder)
    files = files_to_push(folder)
    instead = _with_base(folder, options.base)
    for path in files:
        say(f"{path.stat().st_size:>15,}  {path.name}")
    if options.dry_run:
        say(f"nothing was uploaded (--dry-run): {len(files)} files of {folder}")
        return
    with ended_by_signals("nothing is shown in the repository yet"):
        say(push(folder, options.repository, private=not options.public, message=options.message, instead=instead))


def _with_base(folder: Path, base: str | None) -> dict[str, bytes]:
    """An adapter's configuration as others can read it: with the `base` of the hub, and no path of this machine."""
    found = {}
    for name, field in _BASES.items():
        if not (folder / name).is_file():
            continue
        config = read_json_object(folder / name, "save the adapter again")
        ours = str(config.get(field) or "")
        if base is None and (not ours or not is_local(ours)):
            continue
        if base is None:
            alone = f"{name} will name the base {Path(ours).name!r}, without its folder"
            note(f"{alone}; --base ORG/NAME names one of the hub")
        found[name] = json.dumps({**config, field: base or Path(ours).name}, indent=2).encode()
    if base is not None and (is_local(base) or not found):
        why = "is no name of the hub; give ORG/NAME" if is_local(base) else f"{folder} is no adapter; leave it out"
        raise UserError(f"--base {base}: {why}")
    return found


def _folder(given: Path) -> Path:
    if (choice := run_folder.chosen(given)) is not None:
        note(f"the adapter is that of {choice.told('push {} REPO')}")
        given = choice.folder
    adapter = given / run_folder.ADAPTER
    return adapter if adapter.is_dir() else given
