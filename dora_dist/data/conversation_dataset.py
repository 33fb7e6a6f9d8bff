"""Conversations with pictures as token ids, labels and pixels; the order in which they are trained on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.data.conversations import read_conversation, render
from dora_dist.data.dataset import CHUNK, IGNORED, TokenizedData, encode, held_out
from dora_dist.data.pictures import PictureProcessor, PictureTokens, missing_pictures
from dora_dist.data.records import read_records
from dora_dist.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config import DataConfig


@dataclass(frozen=True)
class ConversationStats:
    """What became of one set's records: counts of samples, pictures, and tokens (those of pictures included)."""

    samples: int
    pictures: int
    text_only: int
    tokens: int
    label_tokens: int
    truncated: int
    without_labels: int
    without_picture: int  # left out: a picture of theirs is missing
    cutoff_len: int

    def __str__(self) -> str:
        missing = f", {self.without_picture:,} for want of a picture" if self.without_picture else ""
        return (
            f"{self.samples:,} conversations ({self.text_only:,} without pictures), {self.pictures:,} pictures, "
            f"{self.tokens:,} tokens ({self.label_tokens:,} with loss); {self.truncated:,} cut at {self.cutoff_len} "
            f"tokens, {self.without_labels:,} left out for want of labels{missing}"
        )


@dataclass(frozen=True)
class _Store:
    """All records of some sources; pictures are single tokens here. Sample i is tokens[starts[i]:starts[i + 1]]."""

    tokens: Tensor
    labels: Tensor
    starts: Tensor
    pictures: list[tuple[str, ...]]
    places: list[str]
    truncated: list[bool]
    absent: list[bool]


class ConversationDataset(Dataset[dict[str, Any]]):
    """Some of a store's samples; item i is {"input_ids", "labels", "pictures"}: two lists and a list of tensors.

    A sample whose picture cannot be read is a filler with a "problem": what to do about it is for whoever trains.
    """

    def __init__(self, store: _Store, index: Sequence[int], processor: PictureProcessor, group: bool) -> None:
        """group: let `epoch_order` put like with like."""
        self.store, self.index = store, list(index)
        self.tokens, self.labels, self.starts = store.tokens, store.labels, store.starts
        self.reader, self.stands = processor.reader, processor.stands
        kept = torch.tensor(self.index, dtype=torch.int64)
        self.with_pictures = torch.tensor([bool(store.pictures[i]) for i in self.index])
        counts = torch.tensor([len(store.pictures[i]) for i in self.index])
        self.lengths = store.starts.diff()[kept] + counts * (self.stands.count - 1)
        self.epoch_order = self._grouped_order if group else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = self.index[i]
        part = slice(self.starts[sample], self.starts[sample + 1])
        try:
            pictures = [self.reader(path) for path in self.store.pictures[sample]]
        except UserError as error:
            problem = f"{self.store.places[sample]}: {error}"
            return {"input_ids": [0], "labels": [IGNORED], "problem": problem}
        ids, labels = self.tokens[part], self.labels[part]
        repeats = torch.where(ids == self.stands.token_id, self.stands.count, 1)
        return {
            "input_ids": ids.repeat_interleave(repeats).tolist(),
            "labels": labels.repeat_interleave(repeats).tolist(),
            "pictures": pictures,
        }

    def _grouped_order(self, seed: int, batch: int) -> list[int]:
        """All samples in a random order of batches that are alike: with pictures or without, and neighbours in length.

        Which samples share a batch of `batch` is random within their kind; inside a batch they go from long to short,
        so that the micro-batches cut from it hold little padding. What does not fill a batch of its kind is mixed at
        the end. Follows from the arguments alone.
        """
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(self), generator=generator)
        of_kind = [shuffled[self.with_pictures[shuffled]], shuffled[~self.with_pictures[shuffled]]]
        whole = [part for kind in of_kind for part in kind[: len(kind) // batch * batch].split(batch) if len(part)]
        rest = torch.cat([kind[len(kind) // batch * batch :] for kind in of_kind])
        order = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        order += [part for part in rest.split(batch) if len(part)]
        return [i for part in order for i in self._long_first(part)]

    def _long_first(self, samples: Tensor) -> list[int]:
        longest = int(self.lengths.max()) + 1
        key = self.lengths[samples] + longest * self.with_pictures[samples]
        return samples[key.argsort(descending=True, stable=True)].tolist()


def build_conversations(
    data: DataConfig, processor: PictureProcessor, *, seed: int, progress: bool = True
) -> TokenizedData:
    """Load, render and tokenize the run's conversations; the same on every rank, and at every world size.

    Lengths count a picture's tokens. What exceeds data.cutoff_len is cut at the end, and a picture that would be cut
    in two goes as a whole, with all that follows it. A missing file is a UserError, or with data.bad_images = "skip"
    leaves its record out. validation_samples records, chosen by `seed`, are held out of train when `data.validation`
    is None. Raises UserError as `load_records` does, and for a record that is no conversation.
    """
    chosen: Sequence[int]
    rest: Sequence[int]
    train = _tokenize(data, "train", processor, progress)
    if data.validation is not None:
        validating = _tokenize(data, "validation", processor, progress)
        chosen = range(len(validating.places))
        rest = range(len(train.places))
    else:
        validating, held = train, held_out(len(train.places), data.validation_samples, seed)
        chosen = sorted(held)
        rest = [i for i in range(len(train.places)) if i not in held]
    training = _select(train, rest, data, processor, "train")
    if not chosen:
        return TokenizedData(*training)
    return TokenizedData(*training, *_select(validating, chosen, data, processor, "validation"))


def _tokenize(data: DataConfig, split: str, processor: PictureProcessor, progress: bool) -> _Store:
    from tqdm import tqdm

    tokenizer, stands = processor.tokenizer, processor.stands
    named = getattr(data, split)
    rows = list(read_records([named] if isinstance(named, str) else named, {"conversations": list}, split))
    tokens, labels, starts, pictures, places, truncated = array("i"), array("i"), [0], [], [], []
    bar = tqdm(total=len(rows), desc=f"Tokenizing data.{split}", unit=" samples", delay=2.0, disable=not progress)
    with bar:
        for first in range(0, len(rows), CHUNK):
            chunk, rendered = rows[first : first + CHUNK], []
            for place, row in chunk:
                places.append(f"{place} (id {row['id']!r})" if "id" in row else place)
                try:
                    conversation = read_conversation(row)
                    only_answers = data.loss_on == "answer"
                    rendered.append(render(conversation, data.chat_template, tokenizer, stands.token, only_answers))
                except UserError as error:
                    raise UserError(f"{places[-1]}: {error}") from error
                pictures.append(conversation.pictures)
            for number, (ids, answer) in enumerate(encode(tokenizer, rendered), start=first):
                stop, kept = _fitting(ids, stands, data.cutoff_len)
                truncated.append(stop < len(ids))
                pictures[number] = pictures[number][:kept]
                tokens.extend(ids[:stop])
                learnt = (a or data.loss_on == "all" for a in answer[:stop])
                labels.extend(t if a and t != stands.token_id else IGNORED for t, a in zip(ids, learnt, strict=False))
                starts.append(len(tokens))
            bar.update(len(chunk))
    flat_tokens, flat_labels = (torch.frombuffer(flat, dtype=torch.int32) for flat in (tokens, labels))
    absent = _absent(data, processor.reader.folder, pictures, places)
    return _Store(flat_tokens, flat_labels, torch.tensor(starts), pictures, places, truncated, absent)


def _fitting(ids: Sequence[int], stands: PictureTokens, cutoff_len: int) -> tuple[int, int]:
    """How many of a sample's tokens, and how many of its pictures, fit into `cutoff_len`."""
    length = pictures = 0
    for number, token in enumerate(ids):
        length += stands.count if token == stands.token_id else 1
        if length > cutoff_len:
            return number, pictures
        pictures += token == stands.token_id
    return len(ids), pictures


def _absent(data: DataConfig, folder: Path, pictures: list[tuple[str, ...]], places: list[str]) -> list[bool]:
    """Which samples lack a picture's file. Raises UserError for the first unless they are to be left out."""
    missing = missing_pictures(folder, {path for paths in pictures for path in paths})
    absent = [any(path in missing for path in paths) for paths in pictures]
    if missing and data.bad_images == "error":
        first = absent.index(True)
        path = next(path for path in pictures[first] if path in missing)
        raise UserError(
            f"{places[first]}: picture {folder / path} does not exist ({len(missing):,} pictures are missing in all); "
            'set data.image_folder to where they are, or data.bad_images to "skip"'
        )
    return absent


def _select(
    store: _Store, samples: Sequence[int], data: DataConfig, processor: PictureProcessor, split: str
) -> tuple[ConversationDataset, ConversationStats]:
    """Those of `samples` that have their pictures and a label to learn from, and what the selection did."""
    labelled = store.labels != IGNORED
    labelled[store.starts[:-1][store.starts.diff() > 0]] = False  # the first token of a sample is never predicted
    before = torch.cat([torch.zeros(1, dtype=torch.int64), labelled.cumsum(0)])
    counts = before[store.starts[1:]] - before[store.starts[:-1]]
    complete = [i for i in samples if not store.absent[i]]
    kept = [i for i in complete if counts[i] > 0]
    if not kept:
        raise UserError(
            f"none of the {len(samples)} conversations of data.{split} has its pictures and a token to learn from "
            f"within data.cutoff_len = {data.cutoff_len} (a picture is {processor.stands.count} tokens); raise it, or "
            "look at the data"
        )
    dataset = ConversationDataset(store, kept, processor, data.group_by_modality_length)
    stats = ConversationStats(
        samples=len(kept),
        pictures=sum(len(store.pictures[i]) for i in kept),
        text_only=sum(not store.pictures[i] for i in kept),
        tokens=int(dataset.lengths.sum()),
        label_tokens=int(counts[kept].sum()),
        truncated=sum(store.truncated[i] for i in samples),
        without_labels=len(complete) - len(kept),
        without_picture=len(samples) - len(complete),
        cutoff_len=data.cutoff_len,
    )
    return dataset, stats
