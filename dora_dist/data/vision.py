"""Texts and visual features of several tasks, for VL-BART: token ids, targets with scores, features read on demand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.config.names import Sources, by_task, listed
from dora_dist.data.columns import IGNORED, Columns, Table, counts_between, row_of, taken
from dora_dist.data.doubts import Doubts
from dora_dist.data.features import Features
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.reader import Reader, check_fits
from dora_dist.data.records import Record, read_records
from dora_dist.data.sampler import EpochOrder, subtask_order
from dora_dist.data.stats import SubtaskStats
from dora_dist.data.strings import unpack
from dora_dist.data.subtasks import SUBTASKS, Asked
from dora_dist.runtime.errors import UserError

_OF = "task"  # the field that a record gets, for data.train says which task its source is of
_NAMES = tuple(SUBTASKS)


class VisionReader(Reader):
    """A sample is {"input_ids", "labels", "score", "visual"}: two lists, a number, and the features of each picture.

    A text is cut at data.cutoff_len tokens, subtitles first; a target at data.target_len. Variant k of a sample has the
    k-th of its targets, the best first, and that target's score. An epoch has one target of a record whose subtask says
    so, drawn by score, and each of others. Missing features are a UserError, or with data.bad_images = "skip" leave
    their record out. A sample whose features cannot be read has a "problem", and carries no loss.
    """

    follows_from = ("format", "cutoff_len", "target_len", "prompts")
    fields: ClassVar[Mapping[str, type]] = {}
    tokens = ("tokens", "targets")
    notes = ("lengths", "cut_targets", "places", "place starts", "reference starts", "files", "absent")
    learnt = "the target"
    learns_without = True

    def __init__(self, data: DataConfig, tokenizer: Any, width: int | None = None) -> None:
        """width: of the features, where the configuration says it."""
        super().__init__(data, tokenizer)
        self._width = width
        self._features: dict[str, Features] = {}

    def features(self, subtask: str) -> Features:
        """The feature files of a subtask. Raises UserError."""
        if subtask not in self._features:
            of_tasks = by_task(self.data.features)
            field = f'data.features, "{subtask}"' if of_tasks else "data.features"
            self._features[subtask] = Features(of_tasks.get(subtask) or listed(self.data.features), field)
        return self._features[subtask]

    # --- records --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        check_fits(self.tokenizer, cutoff_len=self.data.cutoff_len, target_len=self.data.target_len)
        for subtask in dict.fromkeys([*by_task(self.data.train), *by_task(self.data.validation)]):
            self.features(subtask)

    def records(self, sources: Sources, split: str) -> Iterator[tuple[str, Record]]:
        for subtask, names in by_task(sources).items():
            for place, record in read_records(names, self.fields, split):
                yield place, {**record, _OF: subtask}

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        asked = [self._asked(place, record) for place, record in records]
        prompts = self.data.prompts
        texts = [SUBTASKS[r[_OF]].worded(a.text, prompts.get(r[_OF])) for a, (_, r) in zip(asked, records, strict=True)]
        before = [f"{a.before} " if a.before else "" for a in asked]
        whole = [first + rest for first, rest in zip(before, texts, strict=True)]
        targets = [text for a in asked for text, _ in a.targets]
        read = self.tokenizer(text=whole, verbose=False).encodings
        cut = {"truncation": True, "max_length": self.data.target_len, "verbose": False}
        written = iter(self.tokenizer(text_target=targets, **cut).encodings)
        for (place, record), a, encoding, first in zip(records, asked, read, before, strict=True):
            said = [*(text for text, _ in a.targets), a.before, a.text]
            doubts.look(place, said, empty=not any(text.strip() for text, _ in a.targets))
            into.ragged("starts", tokens=_shortened(encoding, len(first.rstrip()), self.data.cutoff_len))
            into.values(lengths=len(encoding.ids), subtasks=_NAMES.index(record[_OF]))
            into.bounds("sample targets", len(a.targets))
            for _, score in a.targets:
                target = next(written)
                into.ragged("target starts", targets=target.ids)
                into.values(scores=score, cut_targets=bool(target.overflowing))
            into.bounds("sample visuals", len(a.visual))
            into.strings("visual starts", visuals=a.visual)
            into.strings("place starts", places=[place])
            into.strings("reference starts", references=[json.dumps(a.reference)])

    def _asked(self, place: str, record: Record) -> Asked:
        try:
            return SUBTASKS[record[_OF]].read(record)
        except UserError as error:
            raise UserError(f"{place}: as a record of {record[_OF]}, {error}") from error

    def opened(self, table: Table, field: str) -> Table:
        """With "files", where the features of each picture or video are, and "absent": which samples lack some."""
        ids = unpack(table["visuals"], table["visual starts"])
        of = table["subtasks"].repeat_interleave(table["sample visuals"].diff())
        files = torch.full((len(ids),), -1)
        for kind in of.unique().tolist():
            chosen = (of == kind).nonzero()[:, 0]
            files[chosen] = self.features(_NAMES[kind]).located([ids[i] for i in chosen.tolist()])
        absent = counts_between(files < 0, table["sample visuals"]) > 0
        if absent.any() and self.data.bad_images == "error":
            missing = int((files < 0).nonzero()[0])
            features = self.features(_NAMES[int(of[missing])])
            count = len({(int(of[i]), ids[i]) for i in (files < 0).nonzero()[:, 0].tolist()})
            raise UserError(
                f"{self._place(table, int(absent.nonzero()[0]))}: there are no features of {ids[missing]!r} in "
                f"{', '.join(features.paths)} ({count:,} are missing in all); give {features.field} the files that "
                'have them, or set data.bad_images to "skip"'
            )
        found = {**table, "files": files, "absent": absent}
        self._check_widths(found)
        return found

    def _check_widths(self, table: Table) -> None:
        """Raise UserError unless the first features of each file are of one width, the configured one if there is."""
        of = table["subtasks"].repeat_interleave(table["sample visuals"].diff())
        known = None if self._width is None else (self._width, "model.feature_dim is")
        for kind in of.unique().tolist():
            features = self.features(_NAMES[kind])
            for number, file in enumerate(features.files):
                for place in ((of == kind) & (table["files"] == number)).nonzero()[:1, 0].tolist():
                    width = file.width(*unpack(table["visuals"], table["visual starts"], place, place + 1))
                    known = known or (width, f"those of {file.path} are of")
                    if width != known[0]:
                        raise UserError(
                            f"{features.field}: {file.path} has features of width {width}, and {known[1]} {known[0]}; "
                            "one model reads features of one width"
                        )

    def check_model(self, table: Table, model: Any) -> None:
        place = int((table["files"] >= 0).nonzero()[0])
        row = int(torch.searchsorted(table["sample visuals"], place, right=True)) - 1
        file = self.features(_NAMES[int(table["subtasks"][row])]).files[int(table["files"][place])]
        width = file.width(*unpack(table["visuals"], table["visual starts"], place, place + 1))
        there = model.config.feature_dim
        if width != there:
            raise UserError(
                f"data.features: the features are of width {width}, and the model reads {there} (model.feature_dim, or "
                f"feature_dim in the base's config.json); set model.feature_dim to {width} where the base is a BART"
            )

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, SubtaskStats]:
        absent, cut = table["absent"], table["lengths"] > self.data.cutoff_len
        kept = index[~absent[index]]
        if not len(kept):
            raise UserError(f"there are features of none of the {len(index)} records of {where}; look at data.features")
        counts = table["subtasks"][kept].bincount(minlength=len(_NAMES)).tolist()
        lengths, bounds = table["target starts"].diff(), table["sample targets"]
        cut_targets, _ = taken(table["cut_targets"], bounds, kept)
        return kept, SubtaskStats(
            samples=len(kept),
            each={name: count for name, count in zip(_NAMES, counts, strict=True) if count},
            tokens=int(self.lengths(table)[kept].sum()),
            targets=int(bounds.diff()[kept].sum()),
            label_tokens=int(taken(lengths, bounds, kept)[0].sum()),
            truncated=int(cut[index].sum()),
            cut_targets=int(cut_targets.sum()),
            without_features=len(index) - len(kept),
            cutoff_len=self.data.cutoff_len,
            target_len=self.data.target_len,
            first_cut=numbers(index[cut[index]]),
            first_left_out=numbers(index[absent[index]]),
        )

    # --- samples --------------------------------------------------------------------------------------------------

    def item(self, table: Table, row: int) -> dict[str, Any]:
        return self.variant(table, row, 0)

    def variant(self, table: Table, row: int, number: int) -> dict[str, Any]:
        first, stop = table["sample targets"][row : row + 2].tolist()
        if not 0 <= number < stop - first:
            raise IndexError(f"sample {row} has {stop - first} targets")
        try:
            visual = self._visual(table, row)
        except UserError as error:
            problem = f"{self._place(table, row)}: {error}"
            return {"input_ids": [self.tokenizer.pad_token_id], "labels": [IGNORED], "problem": problem}
        return {
            "input_ids": row_of(table, row, "tokens").tolist(),
            "labels": row_of(table, first + number, "targets", "target starts").tolist(),
            "score": float(table["scores"][first + number]),
            "visual": visual,
        }

    def _visual(self, table: Table, row: int) -> list[Any]:
        first, stop = table["sample visuals"][row : row + 2].tolist()
        features = self.features(_NAMES[int(table["subtasks"][row])])
        ids = unpack(table["visuals"], table["visual starts"], first, stop)
        return [features(file, id) for file, id in zip(table["files"][first:stop].tolist(), ids, strict=True)]

    def preview(self, table: Table, row: int) -> Preview:
        ids = row_of(table, row, "tokens").tolist()
        first, stop = table["sample targets"][row : row + 2].tolist()
        parts = [Part("text", ids, [False] * len(ids))]
        facts = {"task": _NAMES[int(table["subtasks"][row])]}
        visuals = unpack(table["visuals"], table["visual starts"], *table["sample visuals"][row : row + 2].tolist())
        for number, (id, visual) in enumerate(zip(visuals, self._visual(table, row), strict=True), start=1):
            facts[f"features {number}"] = f"{id} {tuple(visual.features.shape)}"
        for number in range(first, stop):
            target = row_of(table, number, "targets", "target starts").tolist()
            parts.append(Part(f"target, score {float(table['scores'][number]):g}", target, [True] * len(target)))
        if int(table["lengths"][row]) > len(ids):
            facts["cut"] = f"{len(ids):,} of {int(table['lengths'][row]):,} tokens are left"
        return Preview(row + 1, parts, facts)

    def shown(self, table: Table, index: Tensor) -> Mapping[str, int]:
        """The first sample of each task."""
        kinds = table["subtasks"][index]
        return {f"first {_NAMES[kind]}": int((kinds == kind).nonzero()[0]) for kind in kinds.unique().tolist()}

    def _place(self, table: Table, row: int) -> str:
        return unpack(table["places"], table["place starts"], row, row + 1)[0]

    def token_counts(self, table: Table) -> dict[str, Tensor]:
        """After cutting; of targets the best one's."""
        return {
            "tokens in a text": self.lengths(table),
            "tokens in a target": table["target starts"].diff()[table["sample targets"][:-1]],
        }

    def contents(self, table: Table, index: Tensor) -> Iterator[bytes]:
        bounds = table["sample visuals"].tolist()
        for row, text in zip(index.tolist(), super().contents(table, index), strict=True):
            ids = unpack(table["visuals"], table["visual starts"], bounds[row], bounds[row + 1])
            yield text + json.dumps([int(table["subtasks"][row]), ids]).encode()

    def references(self, table: Table, index: Tensor) -> list[tuple[str, Any]]:
        """The task of each sample, and what its answers are compared with."""
        texts = unpack(table["references"], table["reference starts"])
        return [(_NAMES[int(table["subtasks"][i])], json.loads(texts[i])) for i in index.tolist()]

    def columns(self, table: Table, index: Tensor) -> dict[str, Tensor | Iterable[str]]:
        """Tasks by name; the content of features is not looked at."""
        kinds = [_NAMES[kind] for kind in table["subtasks"].tolist()]
        texts = unpack(table["references"], table["reference starts"])
        return {**super().columns(table, index), "subtasks": kinds, "references": texts}

    # --- the order of an epoch ------------------------------------------------------------------------------------

    def parts(self, table: Table, index: Tensor) -> dict[str, int]:
        kinds = table["subtasks"][index]
        each = torch.where(self._drawn(kinds), 1, table["sample targets"].diff()[index])
        return {_NAMES[kind]: int(each[kinds == kind].sum()) for kind in kinds.unique().tolist()}

    def order(self, table: Table, index: Tensor) -> EpochOrder:
        scores, starts = taken(table["scores"], table["sample targets"], index)
        kinds = table["subtasks"][index]
        return partial(subtask_order, kinds, self.lengths(table)[index], scores, starts, self._drawn(kinds))

    def _drawn(self, kinds: Tensor) -> Tensor:
        return torch.tensor([subtask.drawn for subtask in SUBTASKS.values()])[kinds]


def _shortened(encoding: Any, before: int, most: int) -> list[int]:
    """Token ids of a text, at most so many: the end of its first `before` characters goes first, then the text's end.

    What the tokenizer puts around a text stays.
    """
    excess = len(encoding.ids) - most
    if excess <= 0:
        return list(encoding.ids)
    own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    first = [i for i in own if encoding.offsets[i][1] <= before]
    gone = {*[*reversed(first), *reversed(own[len(first) :])][:excess]}
    return [token for i, token in enumerate(encoding.ids) if i not in gone]
