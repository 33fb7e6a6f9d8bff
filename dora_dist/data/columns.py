"""What a data set consists of, column by column, and a short text that differs where any of it does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

Columns = Mapping[str, Tensor | Iterable[str]]
_OF_TOKENS = ("tokens", "documents", "summaries")


class HasColumns(Protocol):
    """A data set that says itself what it consists of."""

    def __len__(self) -> int: ...

    def columns(self) -> Columns:
        """All that its samples and its metrics follow from, and that must be the same on every rank, by name."""
        ...


def token_ids(columns: Columns) -> list[Tensor]:
    """Those of the columns that hold token ids, which a model looks up in its embedding."""
    return [column for name, column in columns.items() if name in _OF_TOKENS and isinstance(column, Tensor)]


def fingerprint(columns: Columns) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of all columns: names, types, shapes and every element."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        if isinstance(column, Tensor):
            digest.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
            digest.update(column.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            continue
        digest.update(f"{name} texts\n".encode())
        for text in column:
            encoded = text.encode(errors="surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))  # where one text ends is content, too
            digest.update(encoded)
    return digest.hexdigest()[:12]
