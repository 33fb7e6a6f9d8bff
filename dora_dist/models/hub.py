"""A model's name to a folder on this machine."""

from pathlib import Path

from dora_dist.config import is_local
from dora_dist.distributed import World, together
from dora_dist.errors import UserError

WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""What is fetched of a hub repository: weights as safetensors, configuration and tokenizer; never pickles."""


def local_folder(name: str, revision: str | None, world: World) -> Path:
    """The folder of a local path, or of a hub name's snapshot (collective).

    One rank per node downloads, into the hub's own cache (which verifies checksums); the others wait, then find it.
    Raises UserError on every rank if it is nowhere.
    """
    if is_local(name):
        return Path(name)
    with together(f"fetching {name}"):
        if world.local_rank == 0:
            fetch(name, revision)
    with together(f"finding {name}"):
        return fetch(name, revision, local_only=True)
    raise AssertionError("unreachable: together() raises or passes on")


def fetch(name: str, revision: str | None = None, local_only: bool = False) -> Path:
    """Download a snapshot of a hub repository (or find it in the cache) and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, local_files_only=local_only))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model.path: {name!r} is no folder here, and could not be had from the hub: {error}; check the name, "
            "log in with `hf auth login` if it is gated, or give the path of a downloaded folder"
        ) from error
