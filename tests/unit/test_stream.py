"""Streamed training data: the order by a plain reference, whatever the ranks and the place where one begins."""

import gzip
import itertools
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import OPTConfig, OPTForCausalLM

from dora_dist.config import DataConfig
from dora_dist.data import FILLER, EpochBatches, TextReader, WithFiller, read
from dora_dist.data.mixture import SHARES, Mixture
from dora_dist.data.stream import Source, window_shares
from dora_dist.models.tokenizer import files_of
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import RemoteFile, Repository, _Remote
from dora_dist.training.doubts import _check_positions
from tests import toy
from tests.unit.test_bad_records import broken_parquet

ROWS = toy.records(50)


def files(folder: Path) -> list[str]:
    """ROWS in four files of four kinds: 20, 10, 15 and 5 of them."""
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "a.jsonl").write_text("\n".join(lines[:20]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[20:30]).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[30:45]), folder / "c.parquet", row_group_size=4)
    (folder / "d.csv").write_text(
        "instruction,output\n" + "".join(f'"{r["instruction"]}",{r["output"]}\n' for r in ROWS[45:])
    )
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv")]


def build(train: Any, places: int = 120, **fields: Any) -> Any:
    data = DataConfig(train=train, **{"cutoff_len": 512, "cache": None, "streaming": True, **fields})
    return read(TextReader(data, toy.tokenizer()), data, seed=3, progress=False, places=places).train


def texts(samples: Any) -> list[str]:
    return [toy.tokenizer().decode(sample["input_ids"], skip_special_tokens=True) for sample in samples]


def whole(train: Any) -> list[str]:
    """The texts as a set that is no stream has them, in the order of the files."""
    return texts(build(train, streaming=False, shuffle_buffer=10_000))


def test_unshuffled_it_is_the_files_in_their_order_again_and_again(tmp_path: Path) -> None:
    names = files(tmp_path)
    expected = whole(names)
    assert texts(build(names, shuffle_buffer=1)) == (expected * 3)[:120]


def test_shuffled_it_is_what_a_plain_reference_says(tmp_path: Path) -> None:
    """Window after window of rows, those of each pass in its own order of the files."""
    names, buffer = files(tmp_path), 8
    by_file = [whole([name]) for name in names]

    def random(number: int, kind: int, size: int) -> list[int]:
        seed = ((3 * 1_000_003 + number) * 8191 + kind) % 2**62
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()

    rows = [text for pass_ in range(3) for k in random(pass_, 1, 4) for text in by_file[k]]
    windows = [rows[i : i + buffer] for i in range(0, 120, buffer)]
    expected = [window[k] for n, window in enumerate(windows) for k in random(n, 0, buffer)]
    found = texts(build(names, shuffle_buffer=buffer))
    assert found == expected[:120] and found != (whole(names) * 3)[:120]
    assert Counter(found[:48]) == Counter(rows[:48])  # whole windows


def test_a_set_that_fits_into_a_window_is_shuffled_whole_pass_by_pass(tmp_path: Path) -> None:
    names = files(tmp_path)
    found = texts(build(names))
    assert Counter(found[:50]) == Counter(found[50:100]) == Counter(whole(names)) and found[:50] != found[50:100]


@pytest.mark.parametrize(("world", "micro"), [(1, 6), (2, 3), (3, 1)])
def test_every_rank_begins_anywhere_and_together_they_have_the_order(world: int, micro: int, tmp_path: Path) -> None:
    names = files(tmp_path)
    expected = list(build(names, shuffle_buffer=8))
    of_rank = []
    for rank in range(world):
        train = build(names, shuffle_buffer=8)
        batches = EpochBatches(
            len(train),
            global_batch_size=6,
            micro_batch_size=micro,
            world_size=world,
            rank=rank,
            order=train.epoch_order,
        )
        resumed = itertools.islice(batches, 7 * (6 // world // micro), None)  # after seven steps
        other = pickle.loads(pickle.dumps(train))  # a loader process
        of_rank.append([[other[i] for i in batch] for batch in resumed])
    together = [sample for step in zip(*of_rank, strict=True) for batch in step for sample in batch]
    per_step = 6 // world // micro
    if per_step == 1:
        assert together == expected[42:]
    else:
        assert sorted(texts(together)) == sorted(texts(expected[42:]))
    train = build(names, shuffle_buffer=8)
    assert [train[i] for i in (100, 3, 99, 0)] == [expected[i] for i in (100, 3, 99, 0)]  # also backwards


def test_sources_have_their_shares_of_every_window(tmp_path: Path) -> None:
    toy.write_records(tmp_path / "a.json", 40)
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": "x"}) + "\n" for i in range(9))
    )
    sources = [
        {"path": str(tmp_path / "a.json"), "weight": 3},
        {"path": str(tmp_path / "b.jsonl"), "format": "completion"},
    ]
    train = build(sources, shuffle_buffer=12)
    assert train.mixture == Mixture(("a", "b"), (3.0, 1.0))
    for start in range(0, 120, 12):
        assert Counter(train[i]["source"] for i in range(start, start + 12)) == {0: 9, 1: 3}
    short = texts(train[i] for i in range(36) if train[i]["source"] == 1)
    assert sorted(short) == sorted(f"{i}?x" for i in range(9))  # each once before one comes again
    assert build(sources).order_facts[SHARES] == [[7500, 2500]]
    with pytest.raises(
        UserError, match=r'source 2 \("b"\) is never drawn: its weight is less than one of the 2 records'
    ):
        build(sources, shuffle_buffer=2)


def test_a_window_is_the_buffer_or_a_pass_of_the_only_source() -> None:
    assert window_shares(Mixture(("a",), (1,)).drawn, 100, [7]) == [7]
    assert window_shares(Mixture(("a",), (1,)).drawn, 100, [None]) == [100]
    assert window_shares(Mixture(("a", "b"), (3, 1)).drawn, 100, [None, 5]) == [75, 25]


def test_a_short_source_comes_pass_by_pass_and_leaves_the_window_as_large_as_it_is(tmp_path: Path) -> None:
    names = files(tmp_path)
    sources = [{"path": names[0]}, {"path": [names[1], names[3]], "weight": 2}]  # of 20 and of 10 + 5 records
    train = build(sources, shuffle_buffer=60)
    assert train.order_facts[SHARES] == [[20, 40]]
    assert "over 60 records at a time (20 of a, 40 of b)" in train.described(None)
    samples = [train[i] for i in range(120)]
    found = [texts(each for each in samples if each["source"] == k) for k in (0, 1)]
    for k, each in enumerate(found):
        size = (20, 15)[k]
        passes = [each[i : i + size] for i in range(0, len(each) // size * size, size)]
        assert all(sorted(one) == sorted(passes[0]) and len(set(one)) == size for one in passes)
        assert len(passes) == (2, 5)[k] and passes[0] != passes[1]
    assert [each["source"] for each in samples[:60]] != sorted(each["source"] for each in samples[:60])
    other = pickle.loads(pickle.dumps(train))
    assert [other[i] for i in (100, 3, 61, 0)] == [samples[i] for i in (100, 3, 61, 0)]


def test_a_name_without_a_record_is_refused_and_an_empty_file_of_a_data_set_is_not(tmp_path: Path) -> None:
    names = files(tmp_path)
    (tmp_path / "empty.csv").write_text("instruction,output\n")
    with pytest.raises(UserError, match=r"^\S*empty.csv holds no records$"):
        build([*names, str(tmp_path / "empty.csv")])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("instruction,output\n")
    (tmp_path / "set" / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    card = "---\nconfigs:\n- config_name: default\n  data_files: ['a.csv', 'b.jsonl']\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    assert sorted(texts(build(str(tmp_path / "set"), 20))) == sorted(whole(names[0]))


def test_a_file_of_the_hub_is_known_by_what_it_holds_and_not_by_its_commit() -> None:
    def edges(commit: str, content: str) -> list[bytes]:
        file = RemoteFile("lab/questions", commit, "a.jsonl", content)
        return list(Source(TextReader(DataConfig(train="a.jsonl"), toy.tokenizer()), [file], "a", seed=1).edges())

    assert edges("1", "x") == edges("2", "x") != edges("1", "y")


def test_what_the_hub_answers_is_told_in_a_line_without_keys() -> None:
    told = pytest.raises(OSError, match=r"the hub does not give it: 403 for https://cdn/file$")
    error = OSError("403 for https://cdn/file?Signature=secret&Expires=1\nForbidden")
    with told, _Remote.__new__(_Remote)._errors():
        raise error
    assert str(Repository("lab/model")._explained(error)).endswith("from the hub: 403 for https://cdn/file")


def test_a_tokenizer_is_saved_as_it_is_whatever_was_cut_with_it() -> None:
    tokenizer = toy.tokenizer()
    before = files_of(tokenizer)
    tokenizer(["a b c"], truncation=True, max_length=2, padding="max_length")
    assert files_of(tokenizer) == before


def test_a_record_of_which_nothing_comes_leaves_its_place_empty_and_says_why(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in ROWS]
    rows[12], rows[14] = '{"instruction": 3', json.dumps({"instruction": "long " * 300, "output": "yes"})
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    kept = {"bad_records": "skip", "loss_on": "answer", "shuffle_buffer": 1, "cutoff_len": 300}
    train = build(str(tmp_path / "a.jsonl"), 50, **kept)
    problems = {i: train[i]["problem"] for i in range(50) if "problem" in train[i]}
    assert [(i, each.field) for i, each in problems.items()] == [(12, "data.bad_records"), (14, "data.cutoff_len")]
    assert train.bad == 0 and train.head().bad == 1  # the history says what is known of a whole set
    assert "a.jsonl, line 13 is not JSON" in problems[12].text and "line 15: has no token" in problems[14].text
    filled = WithFiller(train, {"input_ids": [0], "labels": [-100]})
    assert filled[12] == {"input_ids": [0], "labels": [-100], "problem": problems[12]}
    assert filled[13] == train[13] and filled[FILLER] == {"input_ids": [0], "labels": [-100]}
    with pytest.raises(UserError, match="a.jsonl, line 13 is not JSON"):
        build(str(tmp_path / "a.jsonl"), loss_on="answer")
    identity = train.identity()
    (tmp_path / "a.jsonl").unlink()
    gone = pickle.loads(pickle.dumps(train))[0]["problem"]
    assert gone.field is None and "cannot be read: No such file" in gone.text
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:49], rows[48]]))
    assert build(str(tmp_path / "a.jsonl"), 50, **kept).identity() != identity


def test_a_row_that_python_cannot_hold_leaves_its_place_empty_and_no_other_row_is_decoded(tmp_path: Path) -> None:
    broken_parquet(tmp_path / "a.parquet")
    train = build(str(tmp_path / "a.parquet"), 30, bad_records="skip", shuffle_buffer=1)
    problems = {i: train[i]["problem"] for i in range(30) if "problem" in train[i]}
    assert {i: each.field for i, each in problems.items()} == {1: "data.bad_records", 7: "data.bad_records"}
    assert 'a.parquet, record 8: "day" cannot be read' in problems[7].text
    batches = [row.read.func.__self__ for row in train._sources[0].one_pass()]
    assert not any("_rows" in vars(batch) and batch._rows is not None for batch in batches)


def test_what_a_reader_raises_by_mistake_is_told_to_all_ranks_with_its_place(tmp_path: Path) -> None:
    train = build(files(tmp_path)[0], shuffle_buffer=1)

    def fails(*given: Any) -> None:
        raise ZeroDivisionError("by a plugin")

    train._sources[0].reader.encode = fails
    problem = train[2]["problem"]
    assert problem.field is None and problem.text.endswith(
        "a.jsonl, line 5 cannot be read: ZeroDivisionError: by a plugin"
    )


def test_what_the_model_cannot_take_is_refused_though_the_first_records_do_not_show_it(tmp_path: Path) -> None:
    train = build(files(tmp_path), shuffle_buffer=1)
    largest = [max(train[i]["input_ids"]) for i in range(50)]
    rows = max(largest)  # so that the largest token has none
    train.refuse_tokens(rows)
    problems = [train[i].get("problem") for i in range(50)]
    assert [each is not None for each in problems] == [token >= rows for token in largest]
    bad = next(each for each in problems if each is not None)
    assert bad.field == "data.bad_records" and f"of id {rows}, and the model's embedding has {rows} rows" in bad.text
    small = {"vocab_size": 8, "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    learned = OPTForCausalLM(OPTConfig(**small, word_embed_proj_dim=8, max_position_embeddings=500))
    assert int(train.lengths.max()) < 500
    with pytest.raises(UserError, match="cutoff_len = 512: records have up to 512 tokens, and.*for 500 only"):
        _check_positions(learned, 512, train)
