"""Records that cannot be used: an error that says how to do without them, or left out, counted and warned of."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from dora_dist.config import DataConfig
from dora_dist.data import LabelledReader, Reader, TextReader, TokenizedData, read
from dora_dist.runtime.errors import UserError
from tests import toy

ROWS = toy.records(30)
GOOD = [json.dumps(row) for row in ROWS]
BROKEN = {
    "a.jsonl": (["\n".join([*GOOD[:4], GOOD[4][:-9], *GOOD[5:20], '{"instruction": "x"}', *GOOD[21:]])], 2),
    "a.json": (["[" + ",".join([*GOOD[:4], '{"instruction": "x", "output": 3}', *GOOD[5:]]) + "]"], 1),
    "twice.json": (["[" + ",".join([*GOOD[:4], '{"a": [{"b": 1, "b": 2}]}', *GOOD[5:]]) + "]"], 1),
    "a.csv": (["instruction,output\n", *(f'"{r["instruction"]}",yes\n' for r in ROWS[:28]), "a,b,c\n", 'x,"y"z\n'], 2),
    "b.csv": ([b"instruction,output\n", *[b"a,b\n"] * 20, b"a\xff,b\n", b"a,b\n"], 1),
}


def build(file: Path, reader: Any = TextReader, **fields: Any) -> TokenizedData:
    data = DataConfig(train=str(file), **{"cutoff_len": 512, "cache": None, "bad_records": "skip", **fields})
    made: Reader = reader(data, toy.tokenizer())
    return read(made, data, seed=1, progress=False)


def written(folder: Path, name: str) -> Path:
    parts = BROKEN[name][0]
    (folder / name).write_bytes(b"".join(part if isinstance(part, bytes) else part.encode() for part in parts))
    return folder / name


@pytest.mark.parametrize("name", BROKEN)
def test_bad_rows_of_any_file_are_errors_or_left_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, bad = written(tmp_path, name), BROKEN[name][1]
    with pytest.raises(UserError, match=rf'{name}, (line|record) \d+.*\(data.bad_records = "skip" would leave such'):
        build(file, bad_records="error")
    train = build(file).train
    there = 21 + bad if name == "b.csv" else 30
    assert train.bad == bad and len(train) == there - bad
    said = " ".join(capsys.readouterr().err.split())
    assert f"data.train: {bad} of {there} records are left out, for they cannot be used (the first: " in said
    assert f"{name}, " in said


def test_what_is_left_is_as_if_the_bad_ones_had_never_been_there(tmp_path: Path) -> None:
    bad = {3: {"text": "\ud800", "label": 1}, 4: {"text": "good", "label": 7}, 1504: {"text": "x", "label": "y"}}
    rows = [bad.get(i, {"text": f"text {i} <s>", "label": i % 2}) for i in range(1600)]
    for name, kept in (("a", rows), ("b", [row for i, row in enumerate(rows) if i not in bad])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    labelled = {"reader": lambda data, tokenizer: LabelledReader(data, tokenizer, 2), "format": "classification"}
    skipped, clean = (build(tmp_path / f"{name}.jsonl", **labelled, validation_samples=9) for name in "ab")
    assert (skipped.train.bad, clean.train.bad) == (3, 0)
    assert skipped.train.fingerprint() == clean.train.fingerprint()
    assert skipped.validation is not None and clean.validation is not None
    assert skipped.validation.fingerprint() == clean.validation.fingerprint()
    doubts = [bytes(each.train.table["doubts"].tolist()).decode() for each in (skipped, clean)]
    assert doubts[0].count("1,597 of 1,597 records") == doubts[1].count("1,597 of 1,597 records") == 1


def test_a_cached_set_says_again_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "a.jsonl")
    for _ in range(2):
        assert build(file, cache=str(tmp_path / "cache")).train.bad == 2
        assert "2 of 30 records are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="a.jsonl, line 5 is not JSON"):
        build(file, cache=str(tmp_path / "cache"), bad_records="error")


def test_too_many_bad_records_and_broken_files_are_errors_always(tmp_path: Path) -> None:
    table = pyarrow.table({"instruction": ["a"] * 30, "output": ["b", *[None] * 4, *["c"] * 25]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data.train: 4 of 30 records cannot be used.*1 in 10.*a.parquet, record 2"):
        build(tmp_path / "a.parquet")
    (tmp_path / "whole.json").write_text("[" + ",".join([*GOOD, "{oops"]) + "]")
    with pytest.raises(UserError, match="whole.json, line 1 is not JSON"):
        build(tmp_path / "whole.json")
    (tmp_path / "head.csv").write_bytes(b"\xff,output\na,b\n")
    with pytest.raises(UserError, match="head.csv, line 1 is not UTF-8"):
        build(tmp_path / "head.csv")
    assert torch.equal(build(written(tmp_path, "a.json")).train.table["bad records"], torch.tensor([1]))


def test_a_set_of_which_every_record_is_bad_is_not_tried_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one whose bad records are all at its beginning, and few, is."""
    monkeypatch.setattr("dora_dist.data.reading.CHUNK", 10)
    bad = '{"text": "x", "label": "y"}\n'
    labelled = {"reader": lambda data, tokenizer: LabelledReader(data, tokenizer, 2), "format": "classification"}
    (tmp_path / "all.jsonl").write_text(bad * 300)
    with pytest.raises(UserError, match="data.train: at least 40 of 300 records cannot be used"):
        build(tmp_path / "all.jsonl", **labelled)
    (tmp_path / "few.jsonl").write_text(bad * 30 + '{"text": "x", "label": 1}\n' * 270)
    assert build(tmp_path / "few.jsonl", **labelled).train.bad == 30


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('"5 tall,yes', "unexpected end of data.*goes on to line 31"),
        ('"5 tall,yes\nc,d\na,"x" y', "',' expected after '\"'.*goes on to line 8"),
        ('"5 tall,yes\nc,d\na,x"', "has 1 cells.*goes on to line 8"),
        ('"5 tall,' + "y" * 2990, "larger than field limit.*goes on to line 7"),
    ],
)
def test_a_quote_that_is_never_closed_is_an_error_of_the_file(
    row: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows how many records it took in, so that it cannot be counted as one."""
    monkeypatch.setattr("dora_dist.data.files._LONGEST_CELL", 3000)
    rows = [*["is 1 odd?,yes"] * 4, row, *["is 2 odd?,no"] * 25]
    (tmp_path / "a.csv").write_text("instruction,output\n" + "\n".join(rows))
    with pytest.raises(UserError, match=f"a.csv, line 6: .*{says}: a quote that is not closed"):
        build(tmp_path / "a.csv")


def broken_parquet(file: Path) -> None:
    """30 records; one text is not UTF-8 and one date is none of Python's, which Parquet holds all the same."""
    outputs = [b"yes", b"\xffno", *[b"no"] * 28]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 30, pyarrow.array(outputs, pyarrow.binary()).buffers())
    dates = pyarrow.array([*[0] * 7, 2**30, *[0] * 22], pyarrow.date32())
    parquet.write_table(pyarrow.table({"instruction": ["a"] * 30, "output": texts, "day": dates}), file)


def test_a_value_of_parquet_that_cannot_be_read_is_a_bad_record(tmp_path: Path) -> None:
    broken_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match='a.parquet, record 2: "output" cannot be read: .*utf-8.*bad_records = "skip"'):
        build(tmp_path / "a.parquet", bad_records="error")
    assert build(tmp_path / "a.parquet").train.bad == 2
