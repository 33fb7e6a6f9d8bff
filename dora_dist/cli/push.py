"""`dora-dist push`: a result to the hub."""

import argparse
from pathlib import Path

from dora_dist.checkpoint import run_folder
from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import Commands, declare
from dora_dist.runtime.console import note, say
from dora_dist.runtime.hub_upload import files_to_push, push


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
    command.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    command.add_argument("--message", metavar="TEXT", help="of the commit")
    command.add_argument("--dry-run", action="store_true", help="list the files, and upload nothing")


def _push(options: argparse.Namespace) -> None:
    folder = _folder(options.folder)
    files = files_to_push(folder)
    for path in files:
        say(f"{path.stat().st_size:>15,}  {path.name}")
    if options.dry_run:
        say(f"nothing was uploaded (--dry-run): {len(files)} files of {folder}")
        return
    with ended_by_signals("nothing is shown in the repository yet"):
        say(push(folder, options.repository, private=not options.public, message=options.message))


def _folder(given: Path) -> Path:
    if (choice := run_folder.chosen(given)) is not None:
        note(f"the adapter is that of {choice.told('push {} REPO')}")
        given = choice.folder
    adapter = given / run_folder.ADAPTER
    return adapter if adapter.is_dir() else given
