"""Documents and their summaries, for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from dora_dist.data.columns import Columns, Table, row_of
from dora_dist.data.doubts import Doubts
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.reader import Reader, check_fits
from dora_dist.data.records import Record
from dora_dist.data.stats import SummaryStats
from dora_dist.data.strings import unpack


class SummaryReader(Reader):
    """A sample is {"input_ids", "labels"}: the tokens of a document and of its summary.

    A document is cut at data.cutoff_len tokens, a summary at data.target_len, both with what the tokenizer puts around
    a text.
    """

    counted = "documents"
    follows_from = ("format", "text_fields", "label_field", "cutoff_len", "target_len")
    starts = "document starts"
    tokens = ("documents", "summaries")
    notes = ("cut_documents", "cut_summaries", "reference starts")

    @property
    def fields(self) -> Mapping[str, type]:
        return {self.data.text_fields[0]: str, self.data.label_field: str}

    @property
    def named_by(self) -> Mapping[str, str]:
        return {self.data.text_fields[0]: "data.text_fields", self.data.label_field: "data.label_field"}

    @property
    def learnt(self) -> str:
        return f'"{self.data.text_fields[0]}" or "{self.data.label_field}"'

    def check(self) -> None:
        check_fits(self.tokenizer, cutoff_len=self.data.longest_text, target_len=self.data.longest_target)

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        for place, record in records:
            texts = [record[field] for field in self.fields]
            doubts.look(place, texts, empty=not all(map(str.strip, texts)))
        documents, summaries = ([record[field] for _, record in records] for field in self.fields)
        into.strings("reference starts", references=summaries)
        longest, most = self.data.longest_text, self.data.longest_target
        cut = {"truncation": True, "verbose": False}
        for encoding in self.tokenizer(text=documents, max_length=longest, **cut).encodings or []:
            into.ragged("document starts", documents=encoding.ids)
            into.values(cut_documents=bool(encoding.overflowing))
        # Some tokenizers write what a model reads and what it writes differently.
        for encoding in self.tokenizer(text_target=summaries, max_length=most, **cut).encodings or []:
            into.ragged("summary starts", summaries=encoding.ids)
            into.values(cut_summaries=bool(encoding.overflowing))

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, SummaryStats]:
        return index, SummaryStats(
            samples=len(index),
            tokens=int(table["document starts"].diff()[index].sum()),
            label_tokens=int(table["summary starts"].diff()[index].sum()),
            cut_documents=int(table["cut_documents"][index].sum()),
            truncated=int(table["cut_summaries"][index].sum()),
            cutoff_len=self.data.longest_text,
            target_len=self.data.longest_target,
            first_cut=numbers(index[table["cut_summaries"][index]]),
        )

    def item(self, table: Table, row: int) -> dict[str, list[int]]:
        document = row_of(table, row, "documents", "document starts")
        summary = row_of(table, row, "summaries", "summary starts")
        return {"input_ids": document.tolist(), "labels": summary.tolist()}

    def preview(self, table: Table, row: int) -> Preview:
        sample = self.item(table, row)
        parts = [
            Part("document", sample["input_ids"], [False] * len(sample["input_ids"])),
            Part("summary", sample["labels"], [True] * len(sample["labels"])),
        ]
        columns = {"document": "cut_documents", "summary": "cut_summaries"}
        cut = [side for side, column in columns.items() if table[column][row]]
        return Preview(row + 1, parts, {"cut": " and ".join(cut)} if cut else {})

    def token_counts(self, table: Table) -> dict[str, Tensor]:
        """After cutting."""
        sides = {"tokens in a document": "document starts", "tokens in a summary": "summary starts"}
        return {words: table[starts].diff() for words, starts in sides.items()}

    def references(self, table: Table, index: Tensor) -> list[str]:
        """The whole text of each sample's summary."""
        texts = unpack(table["references"], table["reference starts"])
        return [texts[i] for i in index.tolist()]

    def columns(self, table: Table, index: Tensor) -> dict[str, Tensor | Iterable[str]]:
        return {**super().columns(table, index), "references": unpack(table["references"], table["reference starts"])}
