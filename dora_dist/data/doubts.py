"""What is odd about data that can be trained on: one warning of a kind, with how often and where first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dora_dist.runtime.console import warn
from dora_dist.runtime.errors import UserError

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

    def mark(self) -> dict[str, Any]:
        """What was found until now, for `back_to`."""
        return {**vars(self), "_tokens": self._tokens.copy()}

    def back_to(self, mark: dict[str, Any]) -> None:
        """Forget what was looked at since."""
        vars(self).update(mark)

    def found(self, field: str, what: str, *, may_be_empty: bool = False) -> list[str]:
        """All warnings, for `say`.

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
        return found


def pack_doubts(found: list[str]) -> Tensor:
    """Warnings as bytes (uint8), which a cache can hold."""
    return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)


def say(field: str, packed: Tensor) -> None:
    """Warn of what `pack_doubts` holds about the set that `field` names."""
    for text in json.loads(packed.numpy().tobytes()):
        warn(f"{field}: {text}")
