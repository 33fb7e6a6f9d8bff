"""Texts: instructions, prompts with completions, messages; all tokens of them are learnt, or the answers' alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dora_dist.data.columns import IGNORED, Columns, Table, counts_between, row_of
from dora_dist.data.doubts import Doubts
from dora_dist.data.formats import FORMATS, Format, Rendered
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.reader import Reader
from dora_dist.data.records import Record, check_characters
from dora_dist.data.stats import TextStats
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokensReader(Reader):
    """A sample is {"input_ids", "labels"}, two lists of one length: a label for each token, IGNORED where it is not
    learnt. `encode` makes the ragged columns tokens and labels, and lengths (n,) before anything is cut.
    """

    notes = ("lengths",)

    def teaches(self, table: Table) -> Tensor:
        return learnt_tokens(table) > 0

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, TextStats]:
        learnt, cut = learnt_tokens(table), table["lengths"] > self.data.longest_text
        kept = index[learnt[index] > 0]
        if not len(kept):
            raise UserError(
                f"none of the {len(index)} samples of {where} has a token to learn from within "
                f"data.cutoff_len = {self.data.longest_text} (the shortest has {int(table['lengths'][index].min())} "
                "tokens); raise it, or look at the answers in the data"
            )
        return kept, TextStats(
            samples=len(kept),
            tokens=int(self.lengths(table)[kept].sum()),
            label_tokens=int(learnt[kept].sum()),
            truncated=int(cut[index].sum()),
            without_labels=len(index) - len(kept),
            cutoff_len=self.data.longest_text,
            first_cut=numbers(index[cut[index]]),
            first_left_out=numbers(index[learnt[index] == 0]),
        )

    def item(self, table: Table, row: int) -> dict[str, list[int]]:
        return {"input_ids": row_of(table, row, "tokens").tolist(), "labels": row_of(table, row, "labels").tolist()}

    def preview(self, table: Table, row: int) -> Preview:
        sample, whole = self.item(table, row), int(table["lengths"][row])
        learnt = [label != IGNORED for label in sample["labels"]]
        learnt[0] = False  # nothing predicts it
        cut = {"cut": f"after {len(learnt):,} of {whole:,} tokens"} if whole > len(learnt) else {}
        return Preview(row + 1, [Part("", sample["input_ids"], learnt)], cut)

    def token_counts(self, table: Table) -> dict[str, Tensor]:
        return {"tokens in a record": table["lengths"]}


class TextReader(TokensReader):
    """Texts of a format.

    loss_on "all": every token is a label; "answer": only the output (of conversations the turns of data.train_on's
    roles, and those that say so) and the end-of-sequence token. cutoff_len counts all tokens, special ones
    included; a sample that is cut loses its end and so its end-of-sequence token.
    """

    follows_from = ("format", "loss_on", "cutoff_len", "train_on", "prompt_template", "answer_field")

    @property
    def format(self) -> Format:  # looked up, not kept: loader processes may have to pickle the reader
        return FORMATS[self.data.format].of(self.data)

    @property
    def fields(self) -> Mapping[str, type]:
        return self.format.fields

    @property
    def named_by(self) -> Mapping[str, str]:
        return self.format.named_by

    @property
    def learnt(self) -> str:
        return self.format.learnt

    @property
    def learns_without(self) -> bool:
        return self.data.loss_on == "all" and self.format.may_be_empty

    def check(self) -> None:
        self.format.check(self.tokenizer)

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        format = self.format
        rendered = [self._rendered(format, place, record) for place, record in records]
        for place, record in records:
            asked, answers = format.texts(record)
            doubts.look(place, [*asked, *answers], empty=bool(answers) and not any(map(str.strip, answers)))
        everywhere = self.data.loss_on == "all"
        for ids, answer in encode(self.tokenizer, rendered):
            into.values(lengths=len(ids))
            ids = ids[: self.data.longest_text]
            labels = [token if everywhere or a else IGNORED for token, a in zip(ids, answer, strict=False)]
            into.ragged("starts", tokens=ids, labels=labels)

    def _rendered(self, format: Format, place: str, record: Record) -> Rendered:
        try:
            rendered = format.render(record, self.tokenizer, self.data.loss_on == "answer")
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        check_characters(place, rendered.text)
        return rendered


def learnt_tokens(table: Table) -> Tensor:
    """(n,) int64: how many tokens of each sample are learnt. The first never is: nothing predicts it."""
    labelled, starts = table["labels"] != IGNORED, table["starts"]
    labelled[starts[:-1][starts.diff() > 0]] = False
    return counts_between(labelled, starts)


def encode(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each sample and whether each token is answer; training and evaluation both count by this.

    Prompt and answer are tokenized as one text, so a token may straddle their border: it is answer, because
    predicting it takes knowing the answer's first characters.
    """
    complete = samples[0].complete
    encoded = tokenizer(
        [sample.text for sample in samples],
        add_special_tokens=not complete,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # its warning about long samples: they are cut and counted by us
    )
    result = []
    for sample, ids, offsets in zip(samples, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        answer = [False] * len(ids)
        for start, stop in sample.answers:
            for i, (first, last) in enumerate(offsets):
                if last > start and first < stop:
                    answer[i] = True
        if not complete:
            if not ids or ids[-1] != tokenizer.eos_token_id:  # some tokenizers put one there themselves
                ids, answer = [*ids, tokenizer.eos_token_id], [*answer, True]
            answer[-1] = True
        result.append((ids, answer))
    return result
