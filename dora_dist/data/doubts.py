"""What is odd about data that can be trained on: one warning of a kind, with how often and where first."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_dist.runtime.console import is_first, warn
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config import RunConfig
    from dora_dist.data.dataset import TokenizedData

MANY = 0.1
"""Share of samples that may be cut before it is worth a warning."""
_MOST_SHOWN = 8


class Doubts:
    """Odd records of one set, by kind: how many, and the place of the first."""

    def __init__(self, tokenizer: Any, *, but: str | None = None) -> None:
        """but: a special token that may be in a text."""
        self._records = self._empty = self._special = 0
        self._first_empty = self._first_special = ""
        self._tokens: Counter[str] = Counter()
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {but}
        if tokenizer.split_special_tokens:  # it reads them as any other text
            special = set()
        self._starts = {token[:3] for token in special}  # few, and looked for much faster than the pattern
        self._pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def look(self, place: str, texts: Iterable[str], *, empty: bool) -> None:
        """Take in one record: all its texts, and whether it has none of what is to be learnt."""
        self._records += 1
        if empty:
            self._first_empty = self._first_empty or place
            self._empty += 1
        suspects = (text for text in texts if any(start in text for start in self._starts))
        found = {token for text in suspects for token in self._pattern.findall(text)}
        if found:
            self._first_special = self._first_special or place
            self._special += 1
            self._tokens.update(found)

    def packed(self, field: str, what: str, *, may_be_empty: bool = False) -> Tensor:
        """All warnings as bytes (uint8), which a cache can hold, for `say`.

        what: words for what is to be learnt of a record. may_be_empty: something is learnt even without it. Raises
        UserError, naming `field`, if no record has it.
        """
        found = []
        if self._empty == self._records > 0:
            text = f"{what} of every record is empty (first: {self._first_empty})"
            if not may_be_empty:
                raise UserError(f"{field}: {text}; there is nothing to learn from: look at the data and data.format")
            found.append(f"{text}; only the prompts are learnt")
        elif self._empty:
            share = f"{self._empty:,} of {self._records:,} records"
            found.append(f"{what} of {share} is empty (first: {self._first_empty}); take them out unless that is meant")
        if self._special:
            names = ", ".join(token for token, _ in self._tokens.most_common(_MOST_SHOWN))
            found.append(
                f"the text of {self._special:,} of {self._records:,} records holds special tokens ({names}; first: "
                f"{self._first_special}), which the model reads as control tokens; take them out unless that is meant"
            )
        return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)


def say(field: str, packed: Tensor) -> None:
    """Warn of what `Doubts.packed` holds about the set that `field` names."""
    for text in json.loads(packed.numpy().tobytes()):
        warn(f"{field}: {text}")


def warn_of_the_whole(config: RunConfig, data: TokenizedData) -> None:
    """Warn of what no single record shows: too few samples, too many that are cut, validation on training samples."""
    batch, samples = config.training.global_batch_size, len(data.train)
    if samples < batch:
        warn(
            f"data.train has {samples:,} samples and training.global_batch_size = {batch}: every step sees all of them "
            f"and {batch - samples:,} places stay empty; lower it, or give more data"
        )
    stats = data.train_stats
    if stats.cut > MANY * stats.records:
        warn(
            f"data.train: {stats.cut:,} of {stats.records:,} samples ({stats.cut / stats.records:.0%}) are longer than "
            f"{stats.limit} and lose their end; raise it, or shorten the data"
        )
    if config.data.validation is not None and is_first():  # only the first rank's warning is heard
        _warn_of_overlap(config, data)


def _warn_of_overlap(config: RunConfig, data: TokenizedData) -> None:
    trained = {_digest(content) for content in data.train.contents()}
    known = sum(_digest(content) in trained for content in data.validation.contents())
    if not known:
        return
    train, validation = (_listed(named) for named in (config.data.train, config.data.validation))
    same = [name for name in validation if any(_one_file(name, other) for other in train)]
    why = f" ({same[0]} is a file of data.train)" if same else ""
    warn(
        f"data.validation: {known:,} of its {len(data.validation):,} samples are in data.train, too{why}; what is "
        "measured on them says nothing about new data"
    )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _one_file(name: str, other: str) -> bool:
    return Path(name).exists() and Path(other).exists() and os.path.samefile(name, other)


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []
