"""LLaVA's conversations with pictures: token ids, labels, and pixels that are read when they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.config.names import Sources, listed
from dora_dist.config.pictures import how_to_get
from dora_dist.data.columns import IGNORED, Columns, Table, counts_between, row_of
from dora_dist.data.conversations import MARK, Conversation, read_conversation, render, with_conversations
from dora_dist.data.doubts import Doubts
from dora_dist.data.formats import Rendered
from dora_dist.data.pictures import PictureProcessor, PictureTokens, missing_pictures
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.reader import Reader
from dora_dist.data.records import OnBad, Record, check_characters, read_records
from dora_dist.data.sampler import EpochOrder, grouped_order
from dora_dist.data.stats import ConversationStats
from dora_dist.data.strings import unpack
from dora_dist.data.texts import encode, learnt_tokens
from dora_dist.runtime.errors import UserError


class ConversationReader(Reader):
    """A sample is {"input_ids", "labels", "pictures"}: two lists and a list of tensors.

    In the columns each picture is one token; a sample has as many as the model takes. The assistant's turns are labels,
    and nothing else. Lengths count a picture's tokens. What exceeds data.cutoff_len is cut at the end, and a picture
    that would be cut in two goes as a whole, with all that follows it. A missing file is a UserError, or with
    data.bad_images = "skip" leaves its record out. A sample whose picture cannot be read is a padding token with a
    "problem": what to do about it is for whoever trains.
    """

    follows_from = ("format", "cutoff_len", "chat_template")
    fields: ClassVar[Mapping[str, type]] = {"conversations": list}
    notes = ("lengths", "named", "places", "place starts", "absent")
    learnt = "what gpt says"

    def __init__(self, data: DataConfig, processor: PictureProcessor) -> None:
        super().__init__(data, processor.tokenizer)
        self.pictures, self.stands = processor.reader, processor.stands
        self.allowed = processor.stands.token

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "picture": asdict(self.stands)}

    def records(self, sources: Sources, split: str, bad: OnBad | None = None) -> Iterator[tuple[str, Record]]:
        return read_records(listed(sources), self.fields, split, prepare=with_conversations, bad=bad)

    def place(self, place: str, record: Record) -> str:
        return f"{place} (id {record['id']!r})" if "id" in record else place

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        conversations, rendered = zip(*(self._rendered(place, record) for place, record in records), strict=True)
        encoded = encode(self.tokenizer, rendered)
        for (place, _), conversation, (ids, answer) in zip(records, conversations, encoded, strict=True):
            answers = [text for role, text in conversation.turns if role == "assistant"]
            said = (text.replace(MARK, "") for _, text in conversation.turns)
            doubts.look(place, said, empty=not any(map(str.strip, answers)))
            stop, kept = _fitting(ids, self.stands, self.data.longest_text)
            learnt = zip(ids[:stop], answer[:stop], strict=True)
            labels = [token if a and token != self.stands.token_id else IGNORED for token, a in learnt]
            into.ragged("starts", tokens=ids[:stop], labels=labels)
            into.bounds("pictures", kept)
            into.strings("path starts", paths=conversation.pictures[:kept])
            into.strings("place starts", places=[place])
            into.values(lengths=len(self.stands.widened(ids)), named=len(conversation.pictures))

    def _rendered(self, place: str, record: Record) -> tuple[Conversation, Rendered]:
        """A record's conversation, and its text for the model."""
        try:
            conversation = read_conversation(record)
            if conversation.pictures and self.stands.count >= self.data.longest_text:
                raise UserError(self._no_room())
            text = render(conversation, self.data.chat_template, self.tokenizer, self.stands.token, True)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        check_characters(place, text.text)
        return conversation, text

    def _no_room(self) -> str:
        return (
            f"a picture is {self.stands.count} tokens, and data.cutoff_len = {self.data.longest_text} leaves no room "
            "for any; raise it (LLaVA-1.5 is trained with 2048)"
        )

    def opened(self, table: Table, field: str) -> Table:
        """With the column "absent": which samples lack a picture's file now."""
        if table["named"].any() and not table["pictures"][-1]:
            raise UserError(f"{field}: {self._no_room()}")
        folder, paths = self.pictures.folder, unpack(table["paths"], table["path starts"])
        missing = missing_pictures(folder, set(paths))
        gone = torch.tensor([path in missing for path in paths], dtype=torch.bool)
        absent = counts_between(gone, table["pictures"]) > 0
        if missing and self.data.bad_images == "error":
            first = int(absent.nonzero()[0])
            path = next(path for path in self._paths(table, first) if path in missing)
            raise UserError(
                f"{self.place_of(table, first)}: picture {folder / path} does not exist ({len(missing):,} pictures are "
                'missing in all); set data.image_folder to where they are, or data.bad_images to "skip"'
                + how_to_get(str(folder), listed(self.data.train))
            )
        return {**table, "absent": absent}

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, ConversationStats]:
        learnt, absent = learnt_tokens(table), table["absent"]
        cut = table["lengths"] > self.data.longest_text
        complete = index[~absent[index]]
        kept = complete[learnt[complete] > 0]
        if not len(kept):
            raise UserError(
                f"none of the {len(index)} conversations of {where} has its pictures and a token to learn from "
                f"within data.cutoff_len = {self.data.longest_text} (a picture is {self.stands.count} tokens); raise "
                "it, or look at the data"
            )
        pictures = table["pictures"].diff()[kept]
        return kept, ConversationStats(
            samples=len(kept),
            pictures=int(pictures.sum()),
            text_only=int((pictures == 0).sum()),
            tokens=int(self.lengths(table)[kept].sum()),
            label_tokens=int(learnt[kept].sum()),
            truncated=int(cut[index].sum()),
            without_labels=len(complete) - len(kept),
            without_picture=len(index) - len(complete),
            cutoff_len=self.data.longest_text,
            first_cut=numbers(index[cut[index]]),
            first_left_out=numbers(index[absent[index] | (learnt[index] == 0)]),
        )

    def item(self, table: Table, row: int) -> dict[str, Any]:
        try:
            pictures = [self.pictures(path) for path in self._paths(table, row)]
        except UserError as error:
            problem = f"{self.place_of(table, row)}: {error}"
            return {"input_ids": [self.tokenizer.pad_token_id], "labels": [IGNORED], "problem": problem}
        ids, labels = row_of(table, row, "tokens"), row_of(table, row, "labels")
        repeats = torch.where(ids == self.stands.token_id, self.stands.count, 1)
        return {
            "input_ids": ids.repeat_interleave(repeats).tolist(),
            "labels": labels.repeat_interleave(repeats).tolist(),
            "pictures": pictures,
        }

    def preview(self, table: Table, row: int) -> Preview:
        """As trained on, but with a single token for each picture."""
        whole, length = (int(column[row]) for column in (table["lengths"], self.lengths(table)))
        learnt = (row_of(table, row, "labels") != IGNORED).tolist()
        learnt[0] = False  # nothing predicts it
        paths = self._paths(table, row)
        facts = {f"picture {number}": f"{path} ({self.stands.count} tokens)" for number, path in enumerate(paths, 1)}
        if whole > length:
            facts["cut"] = f"after {length:,} of {whole:,} tokens"
        return Preview(row + 1, [Part("", row_of(table, row, "tokens").tolist(), learnt)], facts)

    def place_of(self, table: Table, row: int) -> str:
        """Where a sample was read, for messages: the source, the line or the record, and its id."""
        return unpack(table["places"], table["place starts"], row, row + 1)[0]

    def _paths(self, table: Table, row: int) -> list[str]:
        return unpack(table["paths"], table["path starts"], *table["pictures"][row : row + 2].tolist())

    def lengths(self, table: Table) -> Tensor:
        return super().lengths(table) + table["pictures"].diff() * (self.stands.count - 1)

    def token_counts(self, table: Table) -> dict[str, Tensor]:
        return {"tokens in a record": table["lengths"]}

    def contents(self, table: Table, index: Tensor) -> Iterator[bytes]:
        for row, text in zip(index.tolist(), super().contents(table, index), strict=True):
            yield text + json.dumps(self._paths(table, row)).encode()

    def columns(self, table: Table, index: Tensor) -> dict[str, Tensor | Iterable[str]]:
        """Without places: a node may have its files elsewhere. The content of pictures is not looked at."""
        picture = torch.tensor([self.stands.token_id, self.stands.count])
        return {**super().columns(table, index), "tokens of a picture": picture}

    def order(self, table: Table, index: Tensor) -> EpochOrder | None:
        if not self.data.group_by_modality_length:
            return None
        return partial(grouped_order, *self._grouped(table, index))

    def order_facts(self, table: Table, index: Tensor) -> dict[str, Any]:
        grouped = {"data.group_by_modality_length": self.data.group_by_modality_length}
        if not self.data.group_by_modality_length:
            return grouped
        digest = hashlib.sha256(b"".join(column.numpy().tobytes() for column in self._grouped(table, index)))
        return {**grouped, "lengths of the training samples": f"sha256 {digest.hexdigest()[:12]}"}

    def _grouped(self, table: Table, index: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths of the samples, and whether each has pictures."""
        return self.lengths(table)[index], table["pictures"].diff()[index] > 0


def _fitting(ids: Sequence[int], stands: PictureTokens, cutoff_len: int) -> tuple[int, int]:
    """How many of a sample's tokens, and how many of its pictures, fit into `cutoff_len`."""
    length = pictures = 0
    for number, token in enumerate(ids):
        length += stands.count if token == stands.token_id else 1
        if length > cutoff_len:
            return number, pictures
        pictures += token == stands.token_id
    return len(ids), pictures
