"""Files of records that cannot be meant, or probably are not."""

import gzip
import json
import lzma
import os
import zipfile
from functools import partial
from io import BytesIO
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.bad_inputs.case import Folder, Table, Words
from tests.bad_inputs.records import Fields, lines, refused

CASES = Table()
records = partial(refused, CASES)
ROW = {"instruction": "is 1 even?", "output": "false"}
GOOD = json.dumps(ROW)


# ---------------------------------------------------------------------------------------------- files of text

records(
    "broken_line", "a.jsonl", lines(GOOD, "", GOOD[:-9]), "a.jsonl, line 3 is not JSON: Expecting value, at column 40"
)
records(
    "too_many_bad_ones",
    "a.jsonl",
    lines(*[GOOD] * 8, '{"instruction": "x"}'),
    ("data.train: 1 of 9 records cannot be used, and data.bad_records leaves out 1 in 10 at most", "a.jsonl, line 9"),
    bad_records="skip",
)
records(
    "column",
    "a.jsonl",
    lines(GOOD, '{"instruction" "x"}'),
    "a.jsonl, line 2 is not JSON: Expecting ':' delimiter, at column 16",
)
records(
    "list_in_line",
    "a.jsonl",
    lines(GOOD, ["x"]),
    'a.jsonl, line 2: expected an object with "instruction", "output", found ["x"]',
)
records(
    "json_as_jsonl",
    "a.jsonl",
    f"[{GOOD}, {GOOD}]",
    "a.jsonl, line 1: expected an object, found a list; a list of records belongs in a .json file",
)
records(
    "printed_over_lines",
    "a.jsonl",
    json.dumps([ROW], indent=2),
    ("a.jsonl, line 1 is not JSON", "one list over many lines belongs in a file named .json"),
)
records(
    "jsonl_as_json",
    "a.json",
    lines(GOOD, GOOD),
    "a.json, line 2 is not JSON: Extra data, at column 1; one record a line belongs in a file named .jsonl",
)
records(
    "trailing_comma",
    "a.json",
    f"[{GOOD},\n{GOOD},\n]",
    ("a.json, line ", "is not JSON", "take the comma before the ] away"),
)
records("comma_in_object", "a.json", f'[{GOOD},\n{{"instruction": "x",}}]', "take the comma before the } away")
records(
    "missing_comma", "a.json", f"[{GOOD}\n{GOOD}]", "a.json, line 2 is not JSON: Expecting ',' delimiter, at column 1"
)
records(
    "under_a_key",
    "a.json",
    json.dumps({"version": 1, "data": [ROW]}),
    'expected one list of records, found an object; if they are in "data", save that list alone',
)
records("one_object", "a.json", GOOD, "expected one list of records, found an object; put records between [ and ]")
records("a_number", "a.json", "3", "a.json: expected one list of records, found 3")
records(
    "deep_line",
    "a.jsonl",
    lines(GOOD, '{"a":' * 100_000),
    "a.jsonl, line 2 is no record: its JSON is nested too deeply",
)
records("deep_file", "a.json", "[" * 100_000, "a.json is no record: its JSON is nested too deeply")
records(
    "thousands_of_digits",
    "a.jsonl",
    lines(GOOD, '{"a": ' + "1" * 5000 + "}"),
    "a.jsonl, line 2 holds a number of thousands of digits",
)
records("empty_list", "a.json", "[]", "a.json holds no records")
records("blank_lines", "a.jsonl", "\n \n\n", "a.jsonl holds no records")
records("empty_file", "a.json", "", 'data.train = "a.json": the file is empty')
records(
    "key_twice",
    "a.jsonl",
    lines(GOOD, '{"instruction": "x", "output": "y", "output": "z"}'),
    'a.jsonl, line 2: the key "output" is there twice',
)
records(
    "key_twice_inside",
    "a.json",
    f'[{GOOD}, {{"instruction": "x", "output": "y", "m": [{{"k": 1, "k": 2}}]}}]',
    'a.json, record 2: the key "k" is there twice',
)

# ------------------------------------------------------------------------------------------- files of anything


def packed_zip() -> bytes:
    held = BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a.json", GOOD)
    return held.getvalue()


def table(rows: list[Fields], **columns: Any) -> bytes:
    held = BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows) if rows else pyarrow.table(columns), held)
    return held.getvalue()


NO_ROWS = pyarrow.array([], pyarrow.string())
records("utf_16", "a.json", f"[{GOOD}]".encode("utf-16"), "a.json is UTF-16 text: save it as UTF-8")
records(
    "utf_16_without_mark",
    "a.jsonl",
    GOOD.encode("utf-16-le"),
    "a.jsonl is no text that can be read: it holds zero bytes",
)
records(
    "latin_1",
    "a.jsonl",
    lines(GOOD, '{"instruction": "café", "output": ""}').encode("latin-1"),
    "a.jsonl, line 2 is not UTF-8 text: byte 21 is 0xe9; save the file as UTF-8",
)
records(
    "latin_1_json",
    "a.json",
    f'[{GOOD},\n{{"output": "é"}}]'.encode("latin-1"),
    "a.json, line 2 is not UTF-8 text: byte 13 is 0xe9",
)
records("binary", "a.json", bytes(range(256)), "a.json is no text that can be read: it holds zero bytes")
records("gzip", "a.jsonl", gzip.compress(GOOD.encode()), "a.jsonl is a gzip archive: name it .gz behind")
records("zip", "a.json", packed_zip(), "a.json is a zip archive: unpack it first")
records("xz", "a.json", lzma.compress(GOOD.encode()), "a.json is an xz archive: unpack it first")
records("parquet_as_json", "a.json", table([ROW]), "a.json is a Parquet file: name it .parquet")
records(
    "lfs_pointer",
    "a.parquet",
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a.parquet is a Git LFS pointer, not the data: fetch it with `git lfs pull`",
)
records("web_page", "a.json", "<!DOCTYPE html><title>Sign in</title>", "a.json is a web page, not the data")
records("not_parquet", "a.parquet", "PAR", "a.parquet cannot be read as Parquet")
records(
    "parquet_columns",
    "a.parquet",
    table([{"question": "x", "answer": "y"}]),
    'a.parquet, record 1 has no "instruction"; this format needs "instruction", "output"; it has "question", "answer"',
)
records(
    "parquet_header_only", "a.parquet", table([], instruction=NO_ROWS, output=NO_ROWS), "a.parquet holds no records"
)
records(
    "parquet_null",
    "a.parquet",
    table([ROW, {"instruction": "x", "output": None}]),
    'a.parquet, record 2: "output" is null',
)
records(
    "sheet",
    "a.xlsx",
    "PK",
    'data.train = "a.xlsx": unknown kind of file; give .json, .jsonl, .parquet, .csv, .tsv, or .json.gz',
)
records(
    "packed", "a.jsonl.xz", lzma.compress(GOOD.encode()), 'data.train = "a.jsonl.xz": is packed; unpack it, and give'
)
records(
    "packed_parquet",
    "a.parquet.gz",
    gzip.compress(table([ROW])),
    'data.train = "a.parquet.gz": is packed; unpack it, and give',
)
records("not_gzip", "a.jsonl.gz", lines(GOOD), "a.jsonl.gz is not a gzip archive, or a damaged one")
records("half_a_gzip", "a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "a.jsonl.gz ends too soon or is damaged")
records("gzip_of_bad_line", "a.jsonl.gz", gzip.compress(lines(GOOD, "{").encode()), "a.jsonl.gz, line 2 is not JSON")
records("empty_gzip", "a.csv.gz", gzip.compress(b""), "a.csv.gz holds no records")
records("csv_header_only", "a.csv", "instruction,output\n", "a.csv holds no records")
records(
    "csv_without_header",
    "a.csv",
    "is 1 even?,false\nis 2 even?,true\n",
    'a.csv, line 2 has no "instruction"; this format needs "instruction", "output"; it has "is 1 even?", "false"',
)
records(
    "csv_cells",
    "a.csv",
    'instruction,output\n"a\nb",y\nis 1 even, or odd,false\n',
    "a.csv, line 4: has 3 cells and the first line names 2; put a cell that holds a comma",
)
records(
    "csv_quote", "a.csv", 'instruction,output\nx,"y\nz,w\n', "a.csv, line 2: is not a row of a table: unexpected end"
)
records(
    "csv_semicolons", "a.csv", "instruction;output\nx;y\n", 'its cells are parted by ";", not ","; save it with commas'
)
records("tabs_in_csv", "a.csv", "instruction\toutput\nx\ty\n", 'its cells are parted by tabs, not ","; name it .tsv')
records(
    "csv_column_twice", "a.csv", "output,output\nx,y\n", 'a.csv, line 1: the column "output" is there twice; keep one'
)
records(
    "csv_latin_1", "a.csv", "instruction,output\ncafé,y\n".encode("latin-1"), "a.csv, line 2 is not UTF-8 text: byte 4"
)
records(
    "another_kind",
    "a.pkl",
    b"\x80\x04N.",
    'data.train = "a.pkl": unknown kind of file; give .json, .jsonl, .parquet, .csv, .tsv',
)


@CASES.bad(says='data.train = "train.csv": no such file in ')
def missing_csv(folder: Folder) -> Words:
    return folder.run(data={"train": "train.csv"})


@CASES.bad(says='data.train = "a.json": is a folder; give a data file')
def folder_named_as_file(folder: Folder) -> Words:
    folder.text("a.json/b.json", f"[{GOOD}]")
    return folder.run(data={"train": "a.json"})


@CASES.bad(
    says=(
        'data.train = "texts": no .json, .jsonl, .parquet, .csv, .tsv, or .json.gz, .jsonl.gz, .csv.gz, .tsv.gz file '
        "in that folder"
    )
)
def folder_without_data(folder: Folder) -> Words:
    folder.text("texts/a.txt", "x")
    return folder.run(data={"train": "texts"})


@CASES.bad(says='data.train = "a.json": is a link to a.json, which leads to no file')
def link_to_itself(folder: Folder) -> Words:
    os.symlink("a.json", folder / "a.json")
    return folder.run(data={"train": "a.json"})


@CASES.bad(says='data.validation = "a.json": is a link to gone.json, which leads to no file')
def dangling_link(folder: Folder) -> Words:
    os.symlink("gone.json", folder / "a.json")
    return folder.run(data={"validation": "a.json", "validation_samples": 0})
