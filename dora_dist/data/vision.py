"""Texts and visual features of several tasks, for VL-BART: token ids, targets with scores, features read on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.config.names import Sources, by_task, listed, of_task
from dora_dist.data.columns import IGNORED, Columns, Table, counts_between, row_keys, row_of, taken
from dora_dist.data.doubts import Doubts
from dora_dist.data.features import FeatureFile, FeatureFiles, Visual
from dora_dist.data.preview import Part, Preview, numbers
from dora_dist.data.reader import Reader, check_fits
from dora_dist.data.records import OnBad, Record, read_records
from dora_dist.data.sampler import EpochOrder, subtask_order
from dora_dist.data.stats import Cut, Subset, SubtaskStats
from dora_dist.data.strings import pack, unpack
from dora_dist.data.subtasks import SUBTASKS, Example, PromptedText
from dora_dist.runtime.errors import UserError

_OF = "task"  # the field that a record gets, for data.train says which task its source is of
_NAMES = tuple(SUBTASKS)
_SOME = 16  # of a file's features, evenly spaced over the samples, tell whether a resumed run has the same file


class VisionReader(Reader):
    """A sample is {"input_ids", "labels", "score", "visual"}: two lists, a number, and the features of each picture.

    A text is cut at data.cutoff_len tokens, subtitles first and never its prompt; a target at data.target_len. Variant
    k of a sample has the k-th of its targets, the best first, and that target's score. An epoch has one target of a
    record whose subtask says so, drawn by score, and each of others. Missing features are a UserError, or with
    data.bad_images = "skip" leave their record out. A sample whose features cannot be read, or are of another width
    than the first, has a "problem", and carries no loss.
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
        # The width that all features must have, and who says so: the configuration, or the first that are read.
        self._width = None if width is None else (width, "model.feature_dim is")
        self._features: dict[str, FeatureFiles] = {}

    def features(self, subtask: str) -> FeatureFiles:
        """The feature files of a subtask. Raises UserError."""
        if subtask not in self._features:
            field = f'data.features, "{subtask}"' if by_task(self.data.features) else "data.features"
            paths = listed(of_task(self.data.features, subtask))
            self._features[subtask] = FeatureFiles(paths, field, of=SUBTASKS[subtask].about)
        return self._features[subtask]

    # --- records --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        check_fits(self.tokenizer, cutoff_len=self.data.longest_text, target_len=self.data.longest_target)
        for subtask in dict.fromkeys([*by_task(self.data.train), *by_task(self.data.validation)]):
            self.features(subtask)
            prompt, most = self.data.prompts.get(subtask, SUBTASKS[subtask].prompt), self._cutoff(subtask)
            if (length := len(self.tokenizer(text=prompt).input_ids)) > most:
                raise UserError(f"data.cutoff_len = {most}: the prompt of {subtask} alone is {length} tokens; raise it")

    def _cutoff(self, subtask: str) -> int:
        return of_task(self.data.cutoff_len, subtask)

    def records(self, sources: Sources, split: str, bad: OnBad | None = None) -> Iterator[tuple[str, Record]]:
        for subtask, names in by_task(sources).items():
            for place, record in read_records(names, self.fields, split, bad=bad):
                yield place, {**record, _OF: subtask}

    def encode(self, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts) -> None:
        examples = [self._example(place, record) for place, record in records]
        prompts = self.data.prompts
        texts = [SUBTASKS[r[_OF]].prompted(a, prompts.get(r[_OF])) for a, (_, r) in zip(examples, records, strict=True)]
        targets = [text for a in examples for text, _ in a.targets]
        read = self.tokenizer(text=[each.text for each in texts], verbose=False).encodings
        written = iter(self.tokenizer(text_target=targets, verbose=False).encodings)
        for (place, record), a, encoding, text in zip(records, examples, read, texts, strict=True):
            subtask = record[_OF]
            said = [*(text for text, _ in a.targets), a.before, a.text]
            doubts.look(place, said, empty=not any(text.strip() for text, _ in a.targets))
            into.ragged("starts", tokens=_shortened(encoding, text, self._cutoff(subtask)))
            into.values(lengths=len(encoding.ids), subtasks=_NAMES.index(subtask))
            into.bounds("sample targets", len(a.targets))
            for _, score in a.targets:
                target, longest = next(written), of_task(self.data.target_len, subtask)
                into.ragged("target starts", targets=_shortened(target, PromptedText("", range(0), 0), longest))
                into.values(scores=score, cut_targets=len(target.ids) > longest)
            into.bounds("sample visuals", len(a.visual))
            into.strings("visual starts", visuals=a.visual)
            into.strings("place starts", places=[place])
            into.strings("reference starts", references=[json.dumps(a.reference)])

    def _example(self, place: str, record: Record) -> Example:
        try:
            return SUBTASKS[record[_OF]].read(record)
        except UserError as error:
            raise UserError(f"{place}: as a record of {record[_OF]}, {error}") from error

    def opened(self, table: Table, field: str) -> Table:
        """With "files", where the features of each picture or video are, "absent": which samples lack some, and
        "made", a text about each file."""
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
        made, starts = pack(list(self._about_files({**table, "files": files}, of)))
        return {**table, "files": files, "absent": absent, "made": made, "made starts": starts}

    def _about_files(self, table: Table, of: Tensor) -> Iterator[str]:
        """Of each file that is needed: its task, the settings of its extraction, and a digest of some of its features.

        of: (places,), the subtask of each picture or video. Raises UserError for a file whose first features are of
        another width than those of the files before, or than the configured one.
        """
        for kind in of.unique().tolist():
            features = self.features(_NAMES[kind])
            for number, file in enumerate(features.files):
                places = ((of == kind) & (table["files"] == number)).nonzero()[:, 0]
                some = places[torch.arange(count := min(_SOME, len(places))) * len(places) // max(count, 1)]
                found = list(self._readable(file, (self._visual_id(table, place) for place in some.tolist())))
                if found:
                    self._check_width(found[0], f"{features.field}: {file.path} has features", file)
                    digest = hashlib.sha256()
                    for visual in found:
                        digest.update(visual.features.numpy().tobytes() + visual.boxes.numpy().tobytes())
                    yield f"{_NAMES[kind]} {file.made_with()} {digest.hexdigest()[:12]}"

    def _readable(self, file: FeatureFile, ids: Iterable[str]) -> Iterator[Visual]:
        """Those features that can be read. With data.bad_images = "error" the first must be: UserError; others that
        cannot be are problems of their samples."""
        try:
            for number, id in enumerate(ids):
                try:
                    yield file(id)
                except UserError:
                    if number == 0 and self.data.bad_images == "error":
                        raise
        finally:
            file.close()  # for a process that is forked must not have it open

    def _check_width(self, visual: Visual, what: str, file: FeatureFile) -> None:
        width = visual.features.shape[1]
        self._width = self._width or (width, f"those of {file.path} are of")
        known, who = self._width
        if width != known:
            raise UserError(f"{what} of width {width}, and {who} {known}; one model reads features of one width")

    def check_model(self, table: Table, model: Any) -> None:
        config = model.config
        if self._width is not None and self._width[0] != config.feature_dim:
            width = self._width[0]
            raise UserError(
                f"data.features: the features are of width {width}, and the model reads {config.feature_dim} "
                "(model.feature_dim, or feature_dim in the base's config.json); set model.feature_dim to "
                f"{width} where the base is a BART"
            )
        shown = table["sample visuals"].diff()
        if (count := int(shown.max())) > config.images:
            raise UserError(
                f"{self._place(table, int(shown.argmax()))}: has {count} pictures, and the model tells "
                f"{config.images} apart (images in the base's config.json); give a base for as many, or leave such "
                "records out"
            )
        kinds = table["subtasks"].unique().tolist()
        most = max(file.most for kind in kinds for file in self.features(_NAMES[kind]).files)
        if most > config.vocab_size:
            raise UserError(
                f"data.features: a picture or video has up to {most} features, and the model tells them apart by rows "
                f"of its token table, which has {config.vocab_size}; give a base with a larger vocabulary"
            )

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, SubtaskStats]:
        absent, cut = table["absent"], self._cut(table)
        kept = index[~absent[index]]
        if not len(kept):
            raise UserError(f"there are features of none of the {len(index)} records of {where}; look at data.features")
        lengths, bounds = table["target starts"].diff(), table["sample targets"]
        return kept, SubtaskStats(
            samples=len(kept),
            each={name: self._subset(table, index[of], name) for name, of in self._by_subtask(table, index)},
            tokens=int(self.lengths(table)[kept].sum()),
            targets=int(bounds.diff()[kept].sum()),
            label_tokens=int(taken(lengths, bounds, kept)[0].sum()),
            truncated=int(cut[index].sum()),
            without_features=len(index) - len(kept),
            cutoff_len=self.data.longest_text,
            first_cut=numbers(index[cut[index]]),
            first_left_out=numbers(index[absent[index]]),
        )

    def _subset(self, table: Table, index: Tensor, subtask: str) -> Subset:
        """Counts of the rows of one subtask."""
        kept = index[~table["absent"][index]]
        targets, _ = taken(table["cut_targets"], table["sample targets"], kept)
        target_len = of_task(self.data.target_len, subtask)
        return Subset(
            samples=len(kept),
            texts=Cut(
                f"texts of {subtask}",
                int(self._cut(table)[index].sum()),
                len(index),
                f"data.cutoff_len = {self._cutoff(subtask)} tokens",
            ),
            targets=Cut(
                f"targets of {subtask}", int(targets.sum()), len(targets), f"data.target_len = {target_len} tokens"
            ),
        )

    def _by_subtask(self, table: Table, index: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each subtask, and (k,) bool: which rows of `index` are its."""
        kinds = table["subtasks"][index]
        for kind in kinds.unique().tolist():
            yield _NAMES[kind], kinds == kind

    def _cut(self, table: Table) -> Tensor:
        """(n,) bool: which texts lost their end."""
        return table["lengths"] > self.lengths(table)

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

    def _visual(self, table: Table, row: int) -> list[Visual]:
        files, found = self.features(_NAMES[int(table["subtasks"][row])]).files, []
        for place in range(*table["sample visuals"][row : row + 2].tolist()):
            file, id = files[int(table["files"][place])], self._visual_id(table, place)
            found.append(file(id))
            self._check_width(found[-1], f"{file.path}: the features of {id!r} are", file)
        return found

    def _visual_id(self, table: Table, place: int) -> str:
        return unpack(table["visuals"], table["visual starts"], place, place + 1)[0]

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

    def keys(self, table: Table, index: Tensor) -> Tensor:
        """Many pictures have the same questions."""
        seen = row_keys(table["visuals"], table["visual starts"][table["sample visuals"]], index)
        return super().keys(table, index) * 31 + seen

    def references(self, table: Table, index: Tensor) -> list[tuple[str, Any]]:
        """The task of each sample, and what its answers are compared with."""
        texts = unpack(table["references"], table["reference starts"])
        return [(_NAMES[int(table["subtasks"][i])], json.loads(texts[i])) for i in index.tolist()]

    def columns(self, table: Table, index: Tensor) -> dict[str, Tensor | Iterable[str]]:
        """Tasks by name. Of the content of features, some of each file are looked at."""
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


def _shortened(encoding: Any, text: PromptedText, most: int) -> list[int]:
    """Token ids of a text, at most so many: the end of what is shortened first goes first, then the text's end.

    Its prompt stays, and what the tokenizer puts around a text.
    """
    excess = len(encoding.ids) - most
    if excess <= 0:
        return list(encoding.ids)
    own = [(i, encoding.offsets[i][1]) for i, special in enumerate(encoding.special_tokens_mask) if not special]
    may_go = [(i, stop) for i, stop in own if stop > text.prompt.stop or stop <= text.prompt.start]
    first = [i for i, stop in reversed(may_go) if stop <= text.before]
    rest = [i for i, stop in reversed(may_go) if stop > text.before]
    gone = {*[*first, *rest][:excess]}
    return [token for i, token in enumerate(encoding.ids) if i not in gone]
