"""Records of one or two texts and a label, for models that classify or rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.data.columns import IGNORED, Columns, Table, row_of
from dora_dist.data.doubts import Doubts
from dora_dist.data.preview import Figures, Part, Preview, numbers, share
from dora_dist.data.reader import Reader, check_fits
from dora_dist.data.records import Record
from dora_dist.data.stats import LabelledStats
from dora_dist.runtime.errors import UserError

_MOST_LABELS = 10  # that are named


class LabelledReader(Reader):
    """A sample is {"input_ids", "token_type_ids", "label"}.

    A label is a whole number from 0 below `num_labels`, or any number where that is 1 (a rating). Two texts are
    joined as the tokenizer joins pairs; what exceeds data.cutoff_len is cut from the longer one.
    """

    follows_from = ("format", "text_fields", "label_field", "cutoff_len")
    notes = ("cut",)
    learnt = "the text"

    def __init__(self, data: DataConfig, tokenizer: Any, num_labels: int) -> None:
        super().__init__(data, tokenizer)
        self.num_labels = num_labels

    @property
    def fields(self) -> Mapping[str, type]:
        return {**dict.fromkeys(self.data.text_fields, str), self.data.label_field: object}

    @property
    def named_by(self) -> Mapping[str, str]:
        return {**dict.fromkeys(self.data.text_fields, "data.text_fields"), self.data.label_field: "data.label_field"}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "num_labels": self.num_labels}

    def check(self) -> None:
        check_fits(self.tokenizer, cutoff_len=self.data.longest_text)

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        for place, record in records:
            into.values(labels=self._label(place, record[self.data.label_field]))
            texts = [record[field] for field in self.data.text_fields]
            doubts.look(place, texts, empty=not any(map(str.strip, texts)))
        sides = [[record[field] for _, record in records] for field in self.data.text_fields]
        cutting = {"truncation": "longest_first", "max_length": self.data.longest_text, "verbose": False}
        for encoding in self.tokenizer(*sides, **cutting).encodings or []:
            into.ragged("starts", tokens=encoding.ids, segments=encoding.type_ids)
            into.values(cut=bool(encoding.overflowing))

    def _label(self, place: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        said = f'{place}: "{self.data.label_field}" is {value!r}; with model.num_labels = {self.num_labels} it must be'
        if self.num_labels == 1:
            if number and math.isfinite(value) and value != IGNORED:
                return float(value)
            raise UserError(f"{said} a number (but not {IGNORED})")
        if number and value in range(self.num_labels):
            return float(value)
        raise UserError(f"{said} a whole number from 0 to {self.num_labels - 1} (a test split hides its labels)")

    def remarks(self, table: Table) -> list[str]:
        labels = table["labels"]
        there, name = set(labels.tolist()), self.data.label_field
        if len(there) == 1 and len(labels) > 1:
            return [f'"{name}" is {labels[0]:g} in all {len(labels):,} records; nothing tells labels apart there']
        never = [str(label) for label in range(self.num_labels) if label not in there]
        if self.num_labels == 1 or not never:
            return []
        shown = ", ".join([*never[:8], *["..."][: len(never) > 8]])
        return [f'"{name}" is never {shown}; model.num_labels = {self.num_labels} counts labels from 0']

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, LabelledStats]:
        return index, LabelledStats(
            samples=len(index),
            tokens=int(self.lengths(table)[index].sum()),
            truncated=int(table["cut"][index].sum()),
            cutoff_len=self.data.longest_text,
            labels=self._figures(table["labels"][index]),
            first_cut=numbers(index[table["cut"][index]]),
        )

    def _figures(self, labels: Tensor) -> Figures:
        if self.num_labels == 1:
            lowest, highest = labels.aminmax()
            return {"ratings": f"{lowest:g} to {highest:g}", "  mean": f"{labels.mean():.3g}"}
        found, named = Counter(labels.long().tolist()), range(min(self.num_labels, _MOST_LABELS))
        return {f"  label {label}": share(found[label], len(labels)) for label in named}

    def item(self, table: Table, row: int) -> dict[str, Any]:
        return pair(table, row)

    def preview(self, table: Table, row: int) -> Preview:
        ids = self.item(table, row)["input_ids"]
        label = f"{table['labels'][row].item():g} (learnt)"
        return Preview(row + 1, [Part("", ids, [False] * len(ids))], {"label": label})


def pair(table: Table, row: int) -> dict[str, Any]:
    """A sample of one text or two, whose `label` is a number or several."""
    return {
        "input_ids": row_of(table, row, "tokens").tolist(),
        "token_type_ids": row_of(table, row, "segments").tolist(),
        "label": table["labels"][row].tolist(),
    }
