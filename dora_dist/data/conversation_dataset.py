"""Conversations with pictures as token ids, labels and pixels; the order in which they are trained on."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_dist.config.pictures import how_to_get
from dora_dist.data.cache import cached
from dora_dist.data.columns import Columns
from dora_dist.data.conversations import MARK, Conversation, read_conversation, render
from dora_dist.data.dataset import CHUNK, IGNORED, TokenizedData, counts_between, encode, held_out, pieces
from dora_dist.data.doubts import Doubts, say
from dora_dist.data.formats import Rendered
from dora_dist.data.pictures import PictureProcessor, PictureTokens, missing_pictures
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.records import check_characters, read_records
from dora_dist.data.stats import ConversationStats
from dora_dist.data.strings import pack, unpack
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config import DataConfig


@dataclass(frozen=True)
class _Store:
    """All records of some sources, in tensors alone, for the cache and for loader processes.

    Sample i is tokens[starts[i]:starts[i + 1]], where each picture is a single token, and its pictures are
    paths[pictures[i]:pictures[i + 1]]. Paths and places are strings (`unpack`).
    """

    tokens: Tensor
    labels: Tensor
    starts: Tensor
    lengths: Tensor  # before what exceeds the cutoff is cut
    pictures: Tensor
    paths: Tensor
    path_starts: Tensor
    places: Tensor
    place_starts: Tensor
    doubts: Tensor

    def paths_of(self, sample: int) -> list[str]:
        return unpack(self.paths, self.path_starts, *self.pictures[sample : sample + 2].tolist())

    def place(self, sample: int) -> str:
        return unpack(self.places, self.place_starts, sample, sample + 1)[0]


class ConversationDataset(Dataset[dict[str, Any]]):
    """Some of a store's samples; item i is {"input_ids", "labels", "pictures"}: two lists and a list of tensors.

    A sample whose picture cannot be read is a filler with a "problem": what to do about it is for whoever trains.
    """

    def __init__(self, store: _Store, index: Tensor, processor: PictureProcessor, group: bool) -> None:
        """index: which samples of the store are here, int64. group: let `epoch_order` put like with like."""
        self.reader, self.stands = processor.reader, processor.stands
        self.pad_token_id = processor.tokenizer.pad_token_id
        self._store = store
        self.index, self.tokens, self.labels, self.starts = index, store.tokens, store.labels, store.starts
        counts = store.pictures.diff()[index]
        self.with_pictures = counts > 0
        self.lengths = store.starts.diff()[index] + counts * (self.stands.count - 1)
        self.epoch_order = self._grouped_order if group else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = int(self.index[i])
        part = slice(self.starts[sample], self.starts[sample + 1])
        try:
            pictures = [self.reader(path) for path in self._store.paths_of(sample)]
        except UserError as error:
            return {"input_ids": [self.pad_token_id], "labels": [IGNORED], "problem": f"{self.place(i)}: {error}"}
        ids, labels = self.tokens[part], self.labels[part]
        repeats = torch.where(ids == self.stands.token_id, self.stands.count, 1)
        return {
            "input_ids": ids.repeat_interleave(repeats).tolist(),
            "labels": labels.repeat_interleave(repeats).tolist(),
            "pictures": pictures,
        }

    def token_counts(self) -> dict[str, Tensor]:
        return {"tokens in a record": self._store.lengths[self.index]}

    def preview(self, i: int) -> Preview:
        """As trained on, but with a single token for each picture."""
        sample = int(self.index[i])
        part = slice(self.starts[sample], self.starts[sample + 1])
        ids, whole = self.tokens[part].tolist(), int(self._store.lengths[sample])
        learnt = (self.labels[part] != IGNORED).tolist()
        learnt[0] = False  # nothing predicts it
        paths = self._store.paths_of(sample)
        facts = {f"picture {number}": f"{path} ({self.stands.count} tokens)" for number, path in enumerate(paths, 1)}
        if whole > self.lengths[i]:
            facts["cut"] = f"after {int(self.lengths[i]):,} of {whole:,} tokens"
        return Preview(sample + 1, [Part("", ids, learnt)], facts)

    def contents(self) -> Iterator[bytes]:
        """Each sample, with its pictures' paths, as bytes: two that are equal are one sample."""
        index = self.index.tolist()
        for sample, text in zip(index, pieces(self.tokens, self.starts, index), strict=True):
            yield text + json.dumps(self._store.paths_of(sample)).encode()

    def columns(self) -> Columns:
        """Without places: a node may have its files elsewhere. The content of pictures is not looked at."""
        store, stands = self._store, self.stands
        return {
            "tokens": self.tokens,
            "labels": self.labels,
            "starts": self.starts,
            "index": self.index,
            "pictures": store.pictures,
            "paths": store.paths,
            "path starts": store.path_starts,
            "tokens of a picture": torch.tensor([stands.token_id, stands.count]),
        }

    def place(self, i: int) -> str:
        """Where sample i was read, for messages: the source, the line or the record, and its id."""
        return self._store.place(int(self.index[i]))

    @property
    def order_facts(self) -> dict[str, Any]:
        """What an epoch's order follows from beside seed, batch size and number of samples."""
        grouped = {"data.group_by_modality_length": self.epoch_order is not None}
        if not self.epoch_order:
            return grouped
        digest = hashlib.sha256(self.lengths.numpy().tobytes() + self.with_pictures.numpy().tobytes())
        return {**grouped, "lengths of the training samples": f"sha256 {digest.hexdigest()[:12]}"}

    def _grouped_order(self, seed: int, batch: int) -> list[int]:
        """All samples in a random order of batches whose samples all have pictures, or all have none.

        Which samples of a kind share a batch of `batch` is random; inside a batch they go from long to short, so that
        the micro-batches cut from it hold little padding. What does not fill a batch of its kind is mixed at the end.
        Follows from the arguments and `order_facts` alone.
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

    The assistant's turns are labels, and nothing else. Lengths count a picture's tokens. What exceeds data.cutoff_len
    is cut at the end, and a picture that would be cut in two goes as a whole, with all that follows it. A missing file
    is a UserError, or with data.bad_images = "skip" leaves its record out. validation_samples records, chosen by
    `seed`, are held out of train when `data.validation` is None. Raises UserError as `load_records` does, for a record
    that is no conversation, and where no picture fits data.cutoff_len.
    """
    train = _read(data, "train", processor, progress)
    count = len(train[0].lengths)
    if data.validation is not None:
        validation = _read(data, "validation", processor, progress)
        rest, chosen = torch.arange(count), torch.arange(len(validation[0].lengths))
    else:
        validation, held = train, torch.zeros(count, dtype=torch.bool)
        held[list(held_out(count, data.validation_samples, seed))] = True
        rest, chosen = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    training = _select(*train, rest, data, processor, "train")
    if not len(chosen):
        return TokenizedData(*training)
    return TokenizedData(*training, *_select(*validation, chosen, data, processor, "validation"))


def _read(data: DataConfig, split: str, processor: PictureProcessor, progress: bool) -> tuple[_Store, Tensor]:
    """The records of a split, from the cache where they are in it, and which of them lack a picture's file now."""
    named = getattr(data, split)
    sources = [named] if isinstance(named, str) else named
    settings = {name: getattr(data, name) for name in ("format", "cutoff_len", "chat_template")}
    settings |= {"picture": asdict(processor.stands), "sources": sources}  # places name the sources
    made = cached(
        data.cache,
        sources,
        processor.tokenizer,
        settings,
        lambda: vars(_tokenize(sources, split, data, processor, progress)),
    )
    store = _Store(**made)
    say(f"data.{split}", store.doubts)
    return store, _absent(store, data, processor.reader.folder)


def _tokenize(
    sources: Sequence[str], split: str, data: DataConfig, processor: PictureProcessor, progress: bool
) -> _Store:
    stands = processor.stands
    rows = list(read_records(sources, {"conversations": list}, split))
    tokens, labels, starts, lengths = array("i"), array("i"), [0], []
    pictures, paths, places, named = [0], [], [], 0
    doubts = Doubts(processor.tokenizer, but=stands.token)
    bar = console.progress(len(rows), f"tokenizing data.{split}", " samples", delay=2.0, leave=False, shown=progress)
    with bar:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            places += [f"{place} (id {row['id']!r})" if "id" in row else place for place, row in chunk]
            texts = [
                _render(place, row, data, processor) for place, (_, row) in zip(places[first:], chunk, strict=True)
            ]
            conversations, rendered = zip(*texts, strict=True)
            for place, conversation in zip(places[first:], conversations, strict=True):
                answers = [text for role, text in conversation.turns if role == "assistant"]
                said = (text.replace(MARK, "") for _, text in conversation.turns)
                doubts.look(place, said, empty=not any(map(str.strip, answers)))
            shown = [conversation.pictures for conversation in conversations]
            for its_paths, (ids, answer) in zip(shown, encode(processor.tokenizer, rendered), strict=True):
                stop, kept = _fitting(ids, stands, data.cutoff_len)
                lengths.append(len(stands.widened(ids)))
                paths += its_paths[:kept]
                pictures.append(len(paths))
                named += len(its_paths)
                tokens.extend(ids[:stop])
                learnt = zip(ids[:stop], answer[:stop], strict=True)
                labels.extend(t if a and t != stands.token_id else IGNORED for t, a in learnt)
                starts.append(len(tokens))
            bar.update(len(chunk))
    if named and not paths:
        raise UserError(f"data.{split}: {_no_room(stands, data.cutoff_len)}")
    flat_tokens, flat_labels = (torch.frombuffer(flat, dtype=torch.int32) for flat in (tokens, labels))
    counts = torch.tensor(starts), torch.tensor(lengths), torch.tensor(pictures)
    odd = doubts.packed(f"data.{split}", "what gpt says")
    return _Store(flat_tokens, flat_labels, *counts, *pack(paths), *pack(places), odd)


def _render(
    place: str, row: dict[str, Any], data: DataConfig, processor: PictureProcessor
) -> tuple[Conversation, Rendered]:
    """A record's conversation, and its text for the model."""
    stands = processor.stands
    try:
        conversation = read_conversation(row)
        if conversation.pictures and stands.count >= data.cutoff_len:
            raise UserError(_no_room(stands, data.cutoff_len))
        text = render(conversation, data.chat_template, processor.tokenizer, stands.token, True)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    check_characters(place, text.text)
    return conversation, text


def _no_room(stands: PictureTokens, cutoff_len: int) -> str:
    return (
        f"a picture is {stands.count} tokens, and data.cutoff_len = {cutoff_len} leaves no room for any; raise it "
        "(LLaVA-1.5 is trained with 2048)"
    )


def _fitting(ids: Sequence[int], stands: PictureTokens, cutoff_len: int) -> tuple[int, int]:
    """How many of a sample's tokens, and how many of its pictures, fit into `cutoff_len`."""
    length = pictures = 0
    for number, token in enumerate(ids):
        length += stands.count if token == stands.token_id else 1
        if length > cutoff_len:
            return number, pictures
        pictures += token == stands.token_id
    return len(ids), pictures


def _absent(store: _Store, data: DataConfig, folder: Path) -> Tensor:
    """Which samples lack a picture's file. Raises UserError for the first unless they are to be left out."""
    paths = unpack(store.paths, store.path_starts, 0, len(store.path_starts) - 1)
    missing = missing_pictures(folder, set(paths))
    gone = torch.tensor([path in missing for path in paths], dtype=torch.bool)
    absent = counts_between(gone, store.pictures) > 0
    if missing and data.bad_images == "error":
        first = int(absent.nonzero()[0])
        path = next(path for path in store.paths_of(first) if path in missing)
        raise UserError(
            f"{store.place(first)}: picture {folder / path} does not exist ({len(missing):,} pictures are missing in "
            'all); set data.image_folder to where they are, or data.bad_images to "skip"'
            + how_to_get(str(folder), [data.train] if isinstance(data.train, str) else data.train)
        )
    return absent


def _select(
    store: _Store, absent: Tensor, samples: Tensor, data: DataConfig, processor: PictureProcessor, split: str
) -> tuple[ConversationDataset, ConversationStats]:
    """Those of `samples` that have their pictures and a label to learn from, and what the selection did."""
    labelled = store.labels != IGNORED
    labelled[store.starts[:-1][store.starts.diff() > 0]] = False  # the first token of a sample is never predicted
    counts = counts_between(labelled, store.starts)
    complete = samples[~absent[samples]]
    kept = complete[counts[complete] > 0]
    if not len(kept):
        raise UserError(
            f"none of the {len(samples)} conversations of data.{split} has its pictures and a token to learn from "
            f"within data.cutoff_len = {data.cutoff_len} (a picture is {processor.stands.count} tokens); raise it, or "
            "look at the data"
        )
    dataset = ConversationDataset(store, kept, processor, data.group_by_modality_length)
    stats = ConversationStats(
        samples=len(kept),
        pictures=int(store.pictures.diff()[kept].sum()),
        text_only=int((~dataset.with_pictures).sum()),
        tokens=int(dataset.lengths.sum()),
        label_tokens=int(counts[kept].sum()),
        truncated=int((store.lengths[samples] > data.cutoff_len).sum()),
        without_labels=len(complete) - len(kept),
        without_picture=len(samples) - len(complete),
        cutoff_len=data.cutoff_len,
        first_cut=numbers(samples[store.lengths[samples] > data.cutoff_len].tolist()),
        first_left_out=numbers(samples[absent[samples] | (counts[samples] == 0)].tolist()),
    )
    return dataset, stats
