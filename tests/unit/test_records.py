"""Files to records: every kind of file holds the same, and bad ones are named to the line."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dora_dist.data import FORMATS, load_records
from dora_dist.data.records import read_records
from dora_dist.runtime.errors import UserError
from tests import toy
from tests.unit.test_data import write


def test_json_jsonl_and_parquet_hold_the_same_records(tmp_path: Path) -> None:
    rows = toy.records(4)
    sources = [str(toy.write_records(tmp_path / "a.json", 4)), write(tmp_path / "b.jsonl", rows)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for source in [*sources, str(tmp_path / "c.parquet")]:
        assert load_records([source], "instruction") == rows
    assert load_records(sources, "instruction") == rows + rows


def test_tables_and_packed_files_hold_the_same_records(tmp_path: Path) -> None:
    rows = [*toy.records(4), {"instruction": 'Say "a,b"\tor\r\nboth', "input": "", "output": "é", "answer": "x"}]
    text = (tmp_path / "a.jsonl").read_bytes() if write(tmp_path / "a.jsonl", rows) else b""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    sources = sorted(path for path in tmp_path.iterdir() if path.name != "a.jsonl")
    assert len(sources) == 6
    for source in sources:
        assert load_records([source], "instruction") == rows, source


def test_a_tables_cells_are_what_their_fields_need(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 'a "b"'}, {"role": "assistant", "content": "c"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "label"], [json.dumps(messages), "3"], ["[]", "high"]])
    found = [record for _, record in read_records([tmp_path / "a.csv"], {"messages": list, "label": object})]
    assert found == [{"messages": messages, "label": 3}, {"messages": [], "label": "high"}]
    (tmp_path / "b.csv").write_text("messages\nhello\n")
    with pytest.raises(UserError, match='b.csv, line 2: "messages" must be a list, written as JSON, found "hello"'):
        load_records([tmp_path / "b.csv"], "messages")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    row = json.dumps(toy.records(1)[0])
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n  \n{row}".encode())
    assert load_records([tmp_path / "a.jsonl"], "instruction") == toy.records(1) * 2


GOOD = json.dumps(toy.records(1)[0])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", f"{GOOD}\n\n{GOOD[:-5]}\n", "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", f'{GOOD}\n"text"\n', 'a.jsonl, line 2: expected an object with "instruction", "output"'),
        (
            "a.jsonl",
            f'{GOOD}\n{{"instruction": "x"}}\n',
            'a.jsonl, line 2 has no "output"; .* "instruction", "output"',
        ),
        (
            "a.jsonl",
            '{"instructions": "x", "output": "y"}',
            'no "instruction".*did you mean to rename "instructions"',
        ),
        ("a.jsonl", '{"instruction": "x", "output": 3}', 'line 1: "output" must be a string, found 3'),
        ("a.jsonl", "\n\n", "a.jsonl holds no records"),
        ("a.json", f"[{GOOD},\n{GOOD},\n{{oops}}]", "a.json, line 3 is not JSON"),
        (
            "a.json",
            f"{GOOD}\n{GOOD}\n",
            "a.json, line 2 is not JSON.* one record a line belongs in a file named .jsonl",
        ),
        ("a.json", f'[{GOOD}, {{"instruction": "x"}}]', 'a.json, record 2 has no "output"'),
        ("a.json", '{"data": []}', "a.json: expected one list of records"),
        ("a.json", "", "a.json: the file is empty"),
        ("a.json", "[]", "a.json holds no records"),
        ("a.parquet", "not parquet", "a.parquet cannot be read as Parquet"),
        ("a.xlsx", "a,b", "a.xlsx: unknown kind of file; give .json, .jsonl, .parquet, .csv"),
    ],
)
def test_bad_files_are_named_to_the_line(name: str, content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        load_records([tmp_path / name], "instruction")


def test_bytes_that_are_not_text_are_named_to_the_line(tmp_path: Path) -> None:
    for name, start in (("a.json", b"[\n"), ("a.jsonl", GOOD.encode() + b"\n")):
        (tmp_path / name).write_bytes(start + b'{"instruction": "\xff"}')
        with pytest.raises(UserError, match=f"{name}, line 2 is not"):
            load_records([tmp_path / name], "instruction")


def test_missing_files_folders_and_unknown_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", toy.records(1))
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean .*train.jsonl\?"):
        load_records([tmp_path / "trian.jsonl"], "instruction")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty'?: "):
        load_records([tmp_path / "empty"], "instruction")
    with pytest.raises(UserError, match="'nobody/nothing': is not whole on this machine, and HF_HUB_OFFLINE is set"):
        load_records(["nobody/nothing"], "instruction")


def test_every_format_names_its_fields(tmp_path: Path) -> None:
    needed = {name: f'"{name}"' for name in ("instruction", "messages")}
    needed |= {"alpaca": '"instruction"', "completion": '"prompt"', "sharegpt": '"conversations"'} | {
        "template": '"output"'
    }
    assert set(needed) == set(FORMATS)
    file = write(tmp_path / "a.jsonl", [{"text": "x"}])
    for name, field in needed.items():
        with pytest.raises(UserError, match=f"line 1 has no {field}"):
            load_records([file], name)
