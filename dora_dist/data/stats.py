"""Counts of what became of a set's records, for its line in the log and its table in `validate --data`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dora_dist.data.preview import Figures, share


class Cut(NamedTuple):
    """How many of so many texts lose their end, for `limit` says so: a field of the configuration and its value."""

    what: str
    cut: int
    of: int
    limit: str


@dataclass(frozen=True, kw_only=True)
class Stats(ABC):
    """Counts of samples and of tokens. Records are numbered from 1. As a text: one line."""

    samples: int  # kept
    tokens: int
    cutoff_len: int
    truncated: int = 0  # kept or not
    first_cut: tuple[int, ...] = ()  # records' numbers
    first_left_out: tuple[int, ...] = ()

    @abstractmethod
    def figures(self) -> Figures:
        """For a table, by row."""

    @property
    def left_out(self) -> int:
        """Records that are not samples."""
        return 0

    @property
    def records(self) -> int:
        """All that were read."""
        return self.samples + self.left_out

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What was cut of what is learnt, or read, separately for each kind of text."""
        return (Cut("samples", self.truncated, self.records, f"data.cutoff_len = {self.cutoff_len} tokens"),)


@dataclass(frozen=True, kw_only=True)
class TextStats(Stats):
    """Counts of texts, parts of which are learnt."""

    label_tokens: int
    without_labels: int  # left out: truncation or the data itself left them nothing to learn from

    @property
    def left_out(self) -> int:
        return self.without_labels

    def figures(self) -> Figures:
        return {
            "records": f"{self.records:,}",
            "  left out: nothing to learn": f"{self.without_labels:,}",
            "samples": f"{self.samples:,}",
            f"  cut at cutoff_len = {self.cutoff_len}": f"{self.truncated:,}",
            "tokens": f"{self.tokens:,}",
            "  learnt": share(self.label_tokens, self.tokens),
        }

    def __str__(self) -> str:
        return f"{self.samples:,} samples, {self._learnt()}"

    def _learnt(self) -> str:
        cut = f", {self.truncated:,} cut at {self.cutoff_len} tokens" if self.truncated else ""
        out = f", {self.without_labels:,} left out: nothing to learn" if self.without_labels else ""
        return f"{self.tokens:,} tokens ({self.label_tokens:,} learnt){cut}{out}"


@dataclass(frozen=True, kw_only=True)
class ConversationStats(TextStats):
    """Counts of conversations about pictures; tokens of pictures are counted, too."""

    pictures: int
    text_only: int
    without_picture: int  # left out: a picture of theirs is missing

    @property
    def left_out(self) -> int:
        return self.without_labels + self.without_picture

    def figures(self) -> Figures:
        rows = super().figures()
        return {
            "records": rows.pop("records"),
            "  left out: nothing to learn": rows.pop("  left out: nothing to learn"),
            "  left out: a picture is missing": f"{self.without_picture:,}",
            "samples": rows.pop("samples"),
            "  without pictures": f"{self.text_only:,}",
            f"  cut at cutoff_len = {self.cutoff_len}": f"{self.truncated:,}",
            "pictures": f"{self.pictures:,}",
            "tokens, those of pictures included": rows.pop("tokens"),
            "  learnt": rows.pop("  learnt"),
        }

    def __str__(self) -> str:
        missing = f", {self.without_picture:,} left out: a picture is missing" if self.without_picture else ""
        return (
            f"{self.samples:,} conversations ({self.text_only:,} without pictures), {self.pictures:,} pictures, "
            f"{self._learnt()}{missing}"
        )


@dataclass(frozen=True, kw_only=True)
class LabelledStats(Stats):
    """Counts of texts with a label; `labels`: rows about labels, for the table."""

    labels: Mapping[str, str] = field(default_factory=dict)

    def figures(self) -> Figures:
        return {
            "samples": f"{self.samples:,}",
            f"  cut at cutoff_len = {self.cutoff_len}": f"{self.truncated:,}",
            "tokens": f"{self.tokens:,}",
            **self.labels,
        }

    def __str__(self) -> str:
        cut = f", {self.truncated:,} cut at {self.cutoff_len} tokens" if self.truncated else ""
        return f"{self.samples:,} samples, {self.tokens:,} tokens{cut}"


@dataclass(frozen=True, kw_only=True)
class SpanStats(Stats):
    """Counts of windows of texts with questions; `questions` are fewer where a text took several windows."""

    questions: int

    def figures(self) -> Figures:
        return {
            "questions": f"{self.questions:,}",
            f"windows of cutoff_len = {self.cutoff_len}": f"{self.samples:,}",
            "tokens": f"{self.tokens:,}",
        }

    def __str__(self) -> str:
        return (
            f"{self.questions:,} questions in {self.samples:,} windows of up to {self.cutoff_len} tokens, "
            f"{self.tokens:,} tokens"
        )


class Subset(NamedTuple):
    """One of several tasks: its samples, targets, and how many texts (left out or not) and targets were cut at what."""

    samples: int
    texts: Cut
    targets: Cut


@dataclass(frozen=True, kw_only=True)
class SubtaskStats(Stats):
    """Counts of records of several tasks, `each` by its name. cutoff_len: the largest of all."""

    label_tokens: int
    each: Mapping[str, Subset]
    targets: int
    without_features: int  # left out: there are no features of its picture or video

    @property
    def left_out(self) -> int:
        return self.without_features

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return tuple(cut for subset in self.each.values() for cut in (subset.texts, subset.targets))

    def figures(self) -> Figures:
        return {
            "records": f"{self.records:,}",
            "  left out: features are missing": f"{self.without_features:,}",
            **{f"  {name}": f"{subset.samples:,}" for name, subset in self.each.items()},
            "tokens of texts": f"{self.tokens:,}",
            "targets": f"{self.targets:,}",
            "tokens of targets (learnt)": f"{self.label_tokens:,}",
            **{f"  {each.what} cut at {each.limit.removeprefix('data.')}": f"{each.cut:,}" for each in self._cut()},
        }

    def __str__(self) -> str:
        each = ", ".join(f"{subset.samples:,} {name}" for name, subset in self.each.items())
        cut = "".join(f", {each.cut:,} {each.what} cut at {each.limit.removeprefix('data.')}" for each in self._cut())
        missing = f", {self.without_features:,} left out: features are missing" if self.without_features else ""
        return (
            f"{self.samples:,} samples ({each}), {self.tokens:,} tokens of texts, {self.label_tokens:,} of "
            f"{self.targets:,} targets{cut}{missing}"
        )

    def _cut(self) -> list[Cut]:
        return [cut for cut in self.cuts if cut.cut]


@dataclass(frozen=True, kw_only=True)
class SummaryStats(Stats):
    """Counts of documents and their summaries; `truncated` counts summaries."""

    label_tokens: int
    cut_documents: int
    target_len: int

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return (Cut("samples", self.truncated, self.records, f"data.target_len = {self.target_len} tokens"),)

    def figures(self) -> Figures:
        return {
            "samples": f"{self.samples:,}",
            "tokens of documents": f"{self.tokens:,}",
            f"  cut at cutoff_len = {self.cutoff_len}": f"{self.cut_documents:,}",
            "tokens of summaries (learnt)": f"{self.label_tokens:,}",
            f"  cut at target_len = {self.target_len}": f"{self.truncated:,}",
        }

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples, {self.tokens:,} tokens of documents ({self.cut_documents:,} cut at "
            f"{self.cutoff_len}), {self.label_tokens:,} of summaries ({self.truncated:,} cut at {self.target_len})"
        )
