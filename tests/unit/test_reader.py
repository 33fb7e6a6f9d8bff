"""A kind of record of one's own: a reader outside of the package, and what it gets without more ado."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dora_dist.config import DataConfig
from dora_dist.data import RaggedDataset, Reader, read
from dora_dist.data.collate import Collator
from dora_dist.data.columns import Columns, Table, row_keys
from dora_dist.data.doubts import Doubts
from dora_dist.data.preview import Part, Preview
from dora_dist.data.stats import LabelledStats
from dora_dist.data.texts import TextReader
from dora_dist.runtime.errors import UserError
from tests import toy


class Words(Reader):
    """A sample is a word of a text, in letters; its weight is a number of the record."""

    fields: ClassVar[Mapping[str, type]] = {"text": str, "weight": int}
    learnt = "the text"
    notes = ("capitals",)

    def encode(self, records: Sequence[tuple[str, dict[str, Any]]], into: Columns, doubts: Doubts) -> None:
        for number, (place, record) in enumerate(records, start=into.records):
            if not record["text"].isascii():
                raise UserError(f"{place}: letters are not all of the alphabet")
            doubts.look(place, [record["text"]], empty=not record["text"])
            for word in record["text"].split():
                into.ragged("starts", tokens=list(word.lower().encode()))
                into.values(number=number, weight=record["weight"], capitals=word.istitle())

    def record_numbers(self, table: Table) -> Tensor:
        return table["number"]

    def select(self, table: Table, index: Tensor, where: str) -> tuple[Tensor, LabelledStats]:
        tokens = int(self.lengths(table)[index].sum())
        return index, LabelledStats(samples=len(index), tokens=tokens, cutoff_len=self.data.cutoff_len)

    def item(self, table: Table, row: int) -> dict[str, Any]:
        part = slice(table["starts"][row], table["starts"][row + 1])
        return {"input_ids": table["tokens"][part].tolist(), "weight": int(table["weight"][row])}

    def preview(self, table: Table, row: int) -> Preview:
        ids = self.item(table, row)["input_ids"]
        return Preview(int(table["number"][row]) + 1, [Part("", ids, [True] * len(ids))], {})


class Heavy(Words):
    """As `Words`, ten times as heavy."""

    def item(self, table: Table, row: int) -> dict[str, Any]:
        return {**super().item(table, row), "weight": 10 * int(table["weight"][row])}


ROWS = [{"text": f"{'One' if i % 2 else 'one'} word{i} more", "weight": i} for i in range(6)]


def load(folder: Path, rows: list[dict[str, Any]], kind: type[Reader] = Words, **fields: Any) -> Any:
    (folder / "data.json").write_text(json.dumps(rows))
    data = DataConfig(train=str(folder / "data.json"), **{"cache": None, **fields})
    return read(kind(data, toy.tokenizer()), data, seed=0, progress=False)


def texts(rows: RaggedDataset) -> list[str]:
    return [bytes(sample["input_ids"]).decode() for sample in rows]


def test_samples_of_a_record_are_held_out_together_and_previews_name_it(tmp_path: Path) -> None:
    found = load(tmp_path, ROWS, validation_samples=2)
    assert (len(found.train), len(found.validation)) == (12, 6)
    for rows in (found.train, found.validation):
        for i, word in enumerate(texts(rows)):
            number = rows.preview(i).record - 1
            assert word in ROWS[number]["text"].lower().split() and rows[i]["weight"] == number
    held = {int(number) for number in found.validation.records}
    assert len(held) == 2 and not held & {int(number) for number in found.train.records}


def test_the_first_records_have_all_of_their_samples(tmp_path: Path) -> None:
    train = load(tmp_path, ROWS, validation_samples=2).train
    first = train.first(3)
    assert len(first) == 9 and texts(first) == texts(train)[:9]
    assert len(train.first(100)) == len(train)


class Looked(Words):
    """Counts the samples whose contents were looked at."""

    count = 0

    def contents(self, table: Table, index: Tensor) -> Iterator[bytes]:
        self.count += len(index)
        return super().contents(table, index)


def test_samples_of_both_sets_are_found_without_looking_at_each(tmp_path: Path) -> None:
    train = load(tmp_path, ROWS, Looked).train
    words = "word3 unheard one wordy4 word5 word5 ones"
    other = load(tmp_path, [{"text": words, "weight": 1}], Looked).train
    assert other.in_both(train) == sum(text in texts(train) for text in texts(other)) == 4
    assert train.in_both(other) == 8  # "one" is six of them
    assert (train.reader.count, other.reader.count) == (2 * 8, 2 * 4)  # of 18 and 7


def test_rows_have_keys_that_follow_from_them_alone() -> None:
    rows = [[], [5], [5], [], [7, 8], list(range(40)), [], list(range(40)), [9] * 40, []]
    column = Columns()
    for row in rows:
        column.ragged("starts", tokens=row)
    table = column.table()
    keys = row_keys(table["tokens"], table["starts"], torch.arange(len(rows))).tolist()
    assert all((keys[i] == keys[j]) == (rows[i] == rows[j]) for i in range(10) for j in range(10))
    assert row_keys(table["tokens"][:0], torch.tensor([0, 0]), torch.tensor([0])).tolist() == keys[:1]


def test_all_columns_but_notes_are_in_the_fingerprint(tmp_path: Path) -> None:
    plain = load(tmp_path, ROWS).train.fingerprint()
    assert load(tmp_path, [*ROWS[:-1], {**ROWS[-1], "weight": 7}]).train.fingerprint() != plain
    assert load(tmp_path, [{**row, "text": row["text"].lower()} for row in ROWS]).train.fingerprint() == plain
    assert load(tmp_path, ROWS, validation_samples=1).train.fingerprint() != plain


def test_a_readers_records_are_cached_under_its_own_name(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    plain, light, again, heavy = (
        load(tmp_path, ROWS, kind, cache=where)
        for kind, where in ((Words, None), (Words, cache), (Words, cache), (Heavy, cache))
    )
    assert list(plain.train) == list(light.train) == list(again.train)
    assert [sample["weight"] for sample in heavy.train] == [10 * sample["weight"] for sample in light.train]
    assert len(list((tmp_path / "cache" / "tokenized").glob("*.safetensors"))) == 2


def test_messages_name_the_place_and_what_is_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"data.json, record 3: letters are not all"):
        load(tmp_path, [*ROWS[:2], {"text": "größer", "weight": 1}])
    with pytest.raises(UserError, match=r'data.json, record 2 has no "weight"'):
        load(tmp_path, [ROWS[0], {"text": "a"}])
    load(tmp_path, [{"text": "a </s> b", "weight": 1}, {"text": "", "weight": 1}, *ROWS])
    said = capsys.readouterr().err
    assert "data.train: the text of 1 of 8 records is empty (first: " in said and "special tokens (</s>; first" in said


def test_columns_are_tensors_that_loader_processes_can_share(tmp_path: Path) -> None:
    train = load(tmp_path, ROWS).train
    assert all(isinstance(column, Tensor) for column in [*train.table.values(), train.index])
    assert train.table["tokens"].dtype == torch.int32 and train.table["capitals"].dtype == torch.bool


def test_a_sample_without_tokens_leaves_a_batch_of_integers() -> None:
    batch = Collator(0)([{"input_ids": [], "labels": []}, {"input_ids": [5], "labels": [5]}])
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert batch["input_ids"].tolist() == [[0], [5]]


def test_data_can_be_handed_to_loader_processes_that_are_not_forked(tmp_path: Path) -> None:
    text = toy.tokenizer()
    data = DataConfig(train=str(toy.write_records(tmp_path / "data.json", 4)), format="instruction", cache=None)
    found = read(TextReader(data, text), data, seed=0, progress=False).train
    assert pickle.loads(pickle.dumps(found))[2] == found[2]
