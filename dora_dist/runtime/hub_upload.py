"""A folder of a model or of an adapter to a repository of the hub: the files that belong there, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import TOKENIZER_FILES
from dora_dist.runtime.hub import first_line

WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "adapter.safetensors")
"""Of a merged folder, of PEFT's adapters and of our own; never a checkpoint's state."""
FILES = (
    *WEIGHTS,
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "dora_dist_adapter.json",
    "model_config.json",
    "*processor_config.json",
    *TOKENIZER_FILES,
    "README.md",
    "LICENSE*",
    "NOTICE*",
)


def files_to_push(folder: Path) -> list[Path]:
    """The files of a folder that go to the hub. Raises UserError where it holds no model and no adapter."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an adapter folder, a merged folder or a run")
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in FILES)
    ]
    if not any(fnmatch(path.name, pattern) for path in found for pattern in WEIGHTS):
        raise UserError(
            f"{folder}: has no weights that belong on the hub ({', '.join(WEIGHTS)}); give an adapter folder, or merge "
            "a run first (dora-dist consolidate)"
        )
    return found


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = True,
    message: str | None = None,
    instead: Mapping[str, bytes] | None = None,
) -> str:
    """Upload a folder's files (`files_to_push`) in one commit, with what is to be there `instead` of those of a name;
    the page of the commit.

    The repository is made if it is not there, `private` or public; one that is there stays as it is. The token is the
    hub library's own (`hf auth login` or HF_TOKEN). Raises UserError where the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

    files = files_to_push(folder)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path.name, (instead or {}).get(path.name, str(path))) for path in files]
        told = message or f"{Path(folder).resolve().name}, by dora_dist"
        commit = api.create_commit(repository, operations, commit_message=told)
    except errors.HFValidationError as error:
        raise UserError(f"{repository}: is no name of a repository; give ORG/NAME ({error})") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code in (401, 403):
            raise UserError(
                f"{repository}: the hub does not let us write there; log in with a token that may (`hf auth login`, or "
                "HF_TOKEN), and check the name"
            ) from error
        raise UserError(f"{repository}: the hub refused the upload ({first_line(error)})") from error
    except Exception as error:  # of the HTTP library, which is another in other versions of the client
        raise UserError(
            f"{repository}: the upload broke off ({first_line(error)}); nothing is shown there yet; repeat it"
        ) from error
    return str(commit.commit_url)
