"""Repositories of the model hub: fetched into the hub's own cache, or found there; never a pickle."""

import io
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from dora_dist.runtime.console import bars
from dora_dist.runtime.errors import UserError

TEXTS = ("*.json", "*.model", "*.txt", "*.jinja")
"""Configuration and tokenizer."""
WANTED = ("*.safetensors", *TEXTS)
"""What is fetched of a model: weights as safetensors, configuration and tokenizer."""
CODE = ("*.py",)
"""A model's own Python code: for model.trust_remote_code alone."""
_TRIES = 3
_BLOCK, _BUFFER = 8 << 20, 1 << 20  # bytes of a remote file that are asked for, and decoded, at a time


class NotReached(UserError):
    """Something is not on this machine, and the hub cannot be asked for it."""


@dataclass(frozen=True)
class Repository:
    """What is wanted of one repository: `patterns` of its files, at a branch, tag or commit (None: its default).

    `field` is what named it, for messages.
    """

    name: str
    kind: Literal["model", "dataset"] = "model"
    revision: str | None = None
    patterns: tuple[str, ...] = WANTED
    field: str = "model.path"

    def fetch(self, local_only: bool = False) -> Path:
        """The folder of the snapshot, which is downloaded unless it is in the cache (`local_only`: found there).

        Files that are there whole are kept when others fail, and a connection that breaks is resumed within a file.
        Raises NotReached if the hub does not answer, UserError if it answers that there is no such thing for us, or
        if weights are wanted and there are none.
        """
        folder = self._snapshot(local_only)
        if WANTED[0] in self.patterns and not any(folder.glob(WANTED[0])):
            raise UserError(
                f"{self.field} = {self.name!r}: has no .safetensors file at its revision {self.revision or 'main'!r}; "
                "weights in other formats are not read: give the revision of a conversion (refs/pr/N, where its "
                "discussions on the hub have one), or load it with transformers, save it with save_pretrained() and "
                "give that folder"
            )
        return folder

    def listed(self) -> tuple[str, dict[str, str]]:
        """The commit, and the names of all files there, each with a digest of its content; nothing is downloaded.

        Raises UserError as `fetch` does.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        try:
            commit = str(HfApi().repo_info(self.name, revision=self.revision, repo_type=self.kind).sha)
            tree = HfApi().list_repo_tree(self.name, recursive=True, revision=commit, repo_type=self.kind)
            return commit, {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}
        except (OSError, ValueError) as error:
            raise self._explained(error) from error
        except Exception as error:  # of the HTTP library
            raise self._not_reached(f"the connection to the hub broke ({first_line(error)})") from error

    def _snapshot(self, local_only: bool) -> Path:
        from huggingface_hub import snapshot_download

        patterns = list(self.patterns) or None
        for attempt in range(1, _TRIES + 1):
            try:
                return Path(
                    snapshot_download(
                        self.name,
                        repo_type=self.kind,
                        revision=self.revision,
                        allow_patterns=patterns,
                        local_files_only=local_only,
                        tqdm_class=bars(),
                    )
                )
            except (OSError, ValueError) as error:
                raise self._explained(error) from error
            except Exception as error:  # of the HTTP library, which is another in other versions of the client
                if attempt == _TRIES:
                    raise self._not_reached(f"the connection to the hub broke ({first_line(error)})") from error
        raise AssertionError("unreachable")

    def _explained(self, error: Exception) -> UserError:
        from huggingface_hub import constants, errors

        label, endpoint = f"{self.field} = {self.name!r}", constants.ENDPOINT
        page = f"{endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        what = "data set" if self.kind == "dataset" else "model"
        if isinstance(error, errors.GatedRepoError):
            return UserError(
                f"{label}: is gated; accept its conditions at {page} and log in on every node with `hf auth login` "
                "(or set HF_TOKEN), or give the path of a downloaded folder"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return UserError(
                f"{label}: is not a folder here, and the hub shows us no such {what}; check the name, log in with "
                "`hf auth login` if it is private, or give the path of a downloaded folder"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return UserError(f"{label}: has no branch, tag or commit {self.revision!r}; look at {page}/tree/main")
        if isinstance(error, errors.LocalEntryNotFoundError):
            if constants.HF_HUB_OFFLINE:
                return self._not_reached("HF_HUB_OFFLINE is set, so the hub is not asked for it")
            cause = error.__cause__ or error
            return self._not_reached(f"the hub ({endpoint}) cannot be reached ({first_line(cause)})")
        return UserError(f"{label}: could not be fetched from the hub: {first_line(error)}")

    def _not_reached(self, why: str) -> NotReached:
        return NotReached(f"{self.field} = {self.name!r}: is not whole on this machine, and {why}")

    @property
    def folder(self) -> str:
        """Where a download by hand would be put."""
        return f"{'data' if self.kind == 'dataset' else 'models'}/{self.name.rpartition('/')[2]}"

    @property
    def command(self) -> str:
        """The command that downloads the same files into `folder`."""
        words = ["hf", "download", self.name]
        words += [pattern for pattern in self.patterns if "*" not in pattern]
        words += ["--repo-type", self.kind] if self.kind != "model" else []
        words += ["--revision", self.revision] if self.revision is not None else []
        words += [word for pattern in self.patterns if "*" in pattern for word in ("--include", pattern)]
        return shlex.join([*words, "--local-dir", self.folder])


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set on the hub at one commit, which is read from there: as far as it is, and never kept."""

    repository: str
    commit: str
    path: str
    content: str
    """A digest of what it holds, the same in every commit that has not changed it."""

    def __str__(self) -> str:
        return f"{self.repository}:{self.path}"

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Its bytes. What goes wrong, now or when they are read, is an OSError; the client tries again by itself."""
        return io.BufferedReader(_Remote(f"datasets/{self.repository}@{self.commit}/{self.path}"), _BUFFER)


class _Remote(io.RawIOBase):
    """A file of the hub whose errors are all OSErrors."""

    def __init__(self, path: str) -> None:
        from huggingface_hub import HfFileSystem

        self._path = path
        with self._errors():
            self._file: Any = HfFileSystem(skip_instance_cache=True).open(path, "rb", block_size=_BLOCK)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._errors():
            found = self._file.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the HTTP library, which is another in other versions of the client
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise OSError(f"the hub does not give it: {first_line(error)}") from error


def wanted(trust_remote_code: bool) -> tuple[str, ...]:
    """The files that count in a model's folder: its code only if it is to run."""
    return (*WANTED, *CODE) if trust_remote_code else WANTED


def fetch(name: str, revision: str | None = None, field: str = "model") -> Path:
    """Download a model (or find it in the cache) and return its folder. Raises UserError with all that is to do."""
    repository = Repository(name, revision=revision, field=field)
    try:
        return repository.fetch()
    except NotReached as error:
        raise UserError(f"{error}.\n{by_hand([repository], f'name {repository.folder} instead')}") from error


def by_hand(repositories: Sequence[Repository], then: str) -> str:
    """How to get repositories where the hub cannot be reached; `then` is what to do with the folders."""
    commands = dict.fromkeys(f"    {repository.command}" for repository in repositories)
    return "\n".join(
        [
            "  Where the hub can be reached, type",
            *commands,
            "  and with these folders copied here, or shared,",
            f"    {then}",
            "  or share the cache (HF_HOME) that they fill without --local-dir, and set HF_HUB_OFFLINE=1 here.",
        ]
    )


def first_line(error: BaseException) -> str:
    """What the hub's client says, without the query of an address, which may be a key to the file."""
    return re.sub(r"\?[^\s'\"]+", "", (str(error).strip() or type(error).__name__).splitlines()[0])
