"""Tokenized data, made by one rank for all ranks of its node, and for later runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from torch import Tensor

from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError
from dora_dist.weights.safetensors_io import TensorWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def cached(
    cache: str | None,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    settings: Mapping[str, Any],
    *,
    code: Iterable[Path],
    make: Callable[[], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """What `make` returns, which follows from the other arguments alone; `cache` is data.cache, `code` as of `key_of`.

    Made here where there is no cache, or a source is not a file. Raises UserError as `tensors_once` does.
    """
    key = key_of(sources, tokenizer, settings, code) if cache is not None else None
    if cache is None or key is None:
        return dict(make())
    return tensors_once(Path(cache).expanduser() / "tokenized", key, make)


def tensors_once(folder: Path, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` returns: made by whoever comes first to `folder` with this key, memory-mapped by all others.

    The lock ends with the process that holds it, however that ends, and the file appears whole or not at all. A
    folder that cannot be written, or locked, is done without. Raises UserError for a damaged file.
    """
    file = folder / f"{key}.safetensors"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{key}.lock"))
        except (OSError, NotImplementedError) as error:
            warn(f"data.cache: {folder} cannot be used ({error}); every rank tokenizes for itself")
            return dict(make())
        if not file.exists():
            made = make()
            try:
                _write(file, made)
            except UserError as error:
                warn(f"data.cache: {error}; every rank tokenizes for itself")
                return dict(made)
    return _mapped(file)


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorWriter(file, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _mapped(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.offset_keys()}
    except SafetensorError as error:
        raise UserError(f"data.cache: {file} is damaged ({error}); delete it") from error


def key_of(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any], code: Iterable[Path] = ()
) -> str | None:
    """A name for what tokenizing makes of files: of their content, the tokenizer, the settings and the code.

    code: files with code besides those of this package. None if a source is not a file here (a hub's data set can
    change under its name).
    """
    if not all(os.path.isfile(source) for source in sources):
        return None
    digest = hashlib.sha256()
    for path in (*sorted({*Path(__file__).parent.glob("*.py"), *code}), *map(Path, sources)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(b"\0")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # those of its last call
    known = {
        "tokenizer": backend,
        "class": type(tokenizer).__qualname__,
        "truncation side": tokenizer.truncation_side,
        "languages": [tokenizer.init_kwargs.get(name) for name in ("src_lang", "tgt_lang")],
        "chat template": tokenizer.chat_template,
        "special tokens": tokenizer.special_tokens_map,  # chat templates may use any of them
        **settings,
    }
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
