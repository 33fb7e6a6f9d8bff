"""Samples and sets as a person can look at them: what is learnt of a sample, and figures of a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Figures = dict[str, str]
"""Words for a person, and what stands in each row under them."""


@dataclass(frozen=True)
class Part:
    """A text of a sample as the model takes it: token ids, and for each whether it is learnt."""

    name: str
    ids: Sequence[int]
    learnt: Sequence[bool]


@dataclass(frozen=True)
class Preview:
    """One sample: the number of its record in its sources (from 1), its texts, and what else it has."""

    record: int
    parts: Sequence[Part]
    facts: Mapping[str, str]

    @property
    def tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts)


def percentiles(what: str, lengths: Tensor) -> Figures:
    """Rows about the distribution of token counts."""
    ordered = lengths.sort().values

    def at(share: float) -> str:
        return f"{int(ordered[min(int(share * len(ordered)), len(ordered) - 1)]):,}"

    return {f"{what}, median": at(0.5), f"{what}, 90 %": at(0.9), f"{what}, 99 %": at(0.99), f"{what}, longest": at(1)}


MOST_NAMED = 5
"""Records of a kind that are named by their numbers."""


def numbers(rows: Tensor) -> tuple[int, ...]:
    """The first MOST_NAMED of some records' numbers, which count from 1 (rows count from 0)."""
    return tuple((rows[:MOST_NAMED] + 1).tolist())


def share(part: int, whole: int) -> str:
    """A count, and which share of another it is."""
    return f"{part:,} ({part / whole:.0%})" if whole else f"{part:,}"


def longest(counts: Mapping[str, Tensor]) -> int:
    """The sample with the most tokens; `counts` as of RaggedDataset.token_counts."""
    return int(torch.stack(list(counts.values())).sum(0).argmax())


def segments(part: Part, tokenizer: Any) -> Iterator[tuple[str, bool, bool]]:
    """The text of a part in pieces: (text, whether it is learnt, whether it is a special token).

    A piece is what decoding adds with its tokens to those before: tokens decoded by themselves lose their spaces.
    """
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    kinds = [(learnt, id in special) for id, learnt in zip(part.ids, part.learnt, strict=True)]
    borders = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    before = ""
    for first, stop in zip([0, *borders], [*borders, len(kinds)], strict=True):
        after = tokenizer.decode(part.ids[:stop])
        text = after.removeprefix(before) if after.startswith(before) else tokenizer.decode(part.ids[first:stop])
        yield text, *kinds[first]
        before = after
