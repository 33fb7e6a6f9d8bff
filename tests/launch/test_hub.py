"""Models and data from the hub: the real client libraries against a stand-in on loopback (tests/hub_server.py)."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from tests import toy
from tests.distributed.training_runs import metrics
from tests.hub_server import Files, Hub, folder_files

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = "huggyllama/llama-7b", "datasets/zwhe99/commonsense_170k"  # as configs/llama7b_dora.json has them
DEAD = "http://127.0.0.1:9"  # the discard service's port: nobody answers
SMALL = {
    "adapter.r": 4,
    "data.validation_samples": 5,
    "data.cache": "null",
    "training.max_steps": 2,
    "training.warmup_steps": 1,
    "checkpoint.save_every": 2,
    "logging.every": 1,
}
WEIGHTS = {"model.safetensors": b"weights"}
CARD = b"""---
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/train-*
  - split: validation
    path: easy/validation.json
- config_name: hard
  data_files: hard.jsonl
---
Questions.
"""

ASK = """
import json, sys
from dora_dist.config.names import data_set
from dora_dist.data.repository import data_files, remote_files
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import fetch
for call in json.loads(sys.argv[1]):
    try:
        if call[0] == "model":
            print(json.dumps([str(fetch(*call[1:], field="model.path"))]))
        elif call[0] == "stream":
            from dora_dist.data.files import read_rows
            files = remote_files(data_set(call[1]), *call[2:], field="data.train")
            rows = [(row.place, row.read()) for file in files for row in read_rows(file, str(file))]
            print(json.dumps(rows))
        elif call[0] == "known":
            files = remote_files(data_set(call[1]), field="data.train")
            print(json.dumps([[file.commit, file.content] for file in files]))
        else:
            print(json.dumps([str(file) for file in data_files(data_set(call[1]), *call[2:], field="data.train")]))
    except UserError as error:
        print(json.dumps(f"error: {error}"))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a toy LLaMA in bf16, and one that is never to be fetched."""
    folder = toy.base_model(tmp_path_factory.mktemp("hub") / "base", torch.bfloat16)
    return {**folder_files(folder), "pytorch_model.bin": b"a pickle"}


def as_json(count: int) -> bytes:
    return json.dumps(toy.records(count)).encode()


def as_parquet(folder: Path, count: int) -> bytes:
    parquet.write_table(pyarrow.Table.from_pylist(toy.records(count)), folder / "written.parquet")
    return (folder / "written.parquet").read_bytes()


def type_in(
    *words: object, endpoint: str, home: Path, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with a hub, and with caches of its own under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(ROOT), **own, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def ask(*calls: tuple[Any, ...], endpoint: str, home: Path, **variables: str) -> list[Any]:
    """What ("model", name, revision) and ("data", source, split) are, in one new process: paths, or an error's text."""
    asked = type_in(sys.executable, "-c", ASK, json.dumps(calls), endpoint=endpoint, home=home, **variables)
    assert asked.returncode == 0, asked.stderr
    return [json.loads(line) for line in asked.stdout.splitlines()]


def small(**changes: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL, **changes}.items()]


def test_the_first_command_as_typed_trains_on_two_ranks_and_one_of_them_downloads(
    hub: Hub, base: Files, tmp_path: Path
) -> None:
    hub.add(MODEL, base)
    hub.add(DATA, {"README.md": b"Questions.", "data/train-00000-of-00001.parquet": as_parquet(tmp_path, 25)})
    command = ["deepspeed", "--num_accelerators", "2", "launch/train.py", "--config", "configs/llama7b_dora.json"]
    options = small(**{"checkpoint.run_dir": tmp_path / "run"})
    trained = type_in(*command, *options, endpoint=hub.url, home=tmp_path / "home")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert list(metrics(tmp_path / "run")["losses"]) == [1, 2]
    assert "20 samples, " in " ".join(trained.stdout.split())

    wanted = {name for name in base if name.endswith((".json", ".safetensors", ".jinja"))}
    wanted |= {"README.md", "train-00000-of-00001.parquet"}
    assert hub.downloads() == dict.fromkeys(wanted, 1)
    lookups = [r.path for r in hub.requests if "/revision/main" in r.path]
    assert sorted(lookups) == [f"/api/{DATA}/revision/main", f"/api/models/{MODEL}/revision/main"]

    merge = ["dora-dist", "consolidate", tmp_path / "run", "--output", tmp_path / "merged"]
    merged = type_in(*merge, endpoint=DEAD, home=tmp_path / "home")  # the base is in the cache
    assert merged.returncode == 0, merged.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["train"] == "zwhe99/commonsense_170k"


def test_without_a_hub_the_message_says_what_to_type_and_that_works(hub: Hub, base: Files, tmp_path: Path) -> None:
    hub.add(MODEL, base)
    hub.add(DATA, {"data/train-00000-of-00001.parquet": as_parquet(tmp_path, 25)})
    recipe = ["dora-dist", "train", "--config", ROOT / "configs/llama7b_dora.json", *small()]

    failed = type_in(*recipe, endpoint=DEAD, home=tmp_path / "home", cwd=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert f"model.path = '{MODEL}'" in failed.stderr and "Connection refused" in failed.stderr
    offline = type_in(*recipe, endpoint=hub.url, home=tmp_path / "home", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    assert hub.requests == []

    commands = [shlex.split(line) for line in failed.stderr.splitlines() if line.strip().startswith("hf download")]
    assert len(commands) == 2
    for command in commands:
        done = type_in(*command, endpoint=hub.url, home=tmp_path / "login", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert hub.downloads()["pytorch_model.bin"] == 0
    options = shlex.split(next(line for line in failed.stderr.splitlines() if "--model.path" in line))
    assert options == ["--model.path", "models/llama-7b", "--data.train", "data/commonsense_170k"]
    trained = type_in(*recipe, *options, endpoint=DEAD, home=tmp_path / "home", cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr

    for command in commands:  # the other way: a cache that is filled beforehand, and shared
        word = command.index("--local-dir")
        assert type_in(*command[:word], endpoint=hub.url, home=tmp_path / "shared", cwd=tmp_path).returncode == 0
    found = ask(
        ("model", MODEL),
        ("data", DATA.removeprefix("datasets/")),
        endpoint=DEAD,
        home=tmp_path / "shared",
        HF_HUB_OFFLINE="1",
    )
    assert [Path(files[0]).exists() for files in found] == [True, True]


def test_a_revision_is_a_branch_or_a_commit_and_another_is_refused(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("lab/model", {"config.json": b'{"now": "old"}', **WEIGHTS})
    hub.add("lab/model", {"config.json": b'{"now": "new"}', **WEIGHTS})
    hub.add("lab/model", {"config.json": b'{"now": "else"}', **WEIGHTS}, "dev")
    hub.add("lab/model", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}, "pickled")
    calls = [("model", "lab/model", revision) for revision in (None, old, "dev", "nowhere", "pickled")]
    *found, refused, pickled = ask(*calls, endpoint=hub.url, home=tmp_path)
    assert [json.loads((Path(folder) / "config.json").read_text())["now"] for [folder] in found] == [
        "new",
        "old",
        "else",
    ]
    assert "has no branch, tag or commit 'nowhere'" in refused
    assert "has no .safetensors file at its revision 'pickled'" in pickled and "refs/pr/N" in pickled


def test_a_gated_repository_and_one_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.add("lab/gated", {"config.json": b"{}", **WEIGHTS}, token="hf_right")
    hub.add("datasets/lab/gated", {"train.json": as_json(2)}, token="hf_right")
    calls = [("model", "lab/gated"), ("data", "lab/gated"), ("model", "lab/nothing"), ("data", "lab/nothing")]
    for token in ("", "hf_wrong"):  # 401 and 403
        *gated, nothing, no_data = ask(*calls, endpoint=hub.url, home=tmp_path, HF_TOKEN=token)
        for text, field in zip(gated, ("model.path", "data.train"), strict=True):
            assert text.startswith(f"error: {field} = 'lab/gated': is gated") and "`hf auth login`" in text
        assert "shows us no such model; check the name" in nothing and "no such data set" in no_data
    [model], [data] = ask(*calls[:2], endpoint=hub.url, home=tmp_path, HF_TOKEN="hf_right")
    assert Path(model, "config.json").exists() and Path(data).name == "train.json"
    assert not any(r.authorized for r in hub.requests if r.path.startswith("/cdn/"))  # tokens stay with the hub


def test_a_connection_that_breaks_is_resumed_and_whole_files_are_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 100_000
    hub.add("lab/model", {"config.json": b"{}", "model.safetensors": weights})
    hub.breaks["model.safetensors"] = [21 << 20]  # the client writes 10 MiB at a time
    [[folder]] = ask(("model", "lab/model"), endpoint=hub.url, home=tmp_path / "closed")
    assert hub.ranges("model.safetensors") == ["", f"bytes={20 << 20}-"]
    assert Path(folder, "model.safetensors").read_bytes() == weights

    hub.requests.clear()
    hub.resets, hub.breaks["model.safetensors"] = True, [11 << 20] * 4
    broken, [folder] = ask(*[("model", "lab/model")] * 2, endpoint=hub.url, home=tmp_path / "reset")
    assert broken.startswith("error: model.path = 'lab/model'") and "Connection reset" in broken
    assert "hf download lab/model" in broken
    assert hub.downloads() == {"config.json": 1, "model.safetensors": 5}
    assert Path(folder, "model.safetensors").read_bytes() == weights


def test_nodes_that_share_a_cache_download_each_file_once(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", **{f"model-{part}.safetensors": os.urandom(1 << 20) for part in range(4)}}
    hub.add("lab/model", files)
    with ThreadPoolExecutor() as nodes:
        both = [nodes.submit(ask, ("model", "lab/model"), endpoint=hub.url, home=tmp_path) for _ in range(2)]
    [[one]], [[other]] = (node.result() for node in both)
    assert one == other and folder_files(Path(one)) == files
    assert hub.downloads() == dict.fromkeys(files, 1)


def test_a_data_set_by_its_card_by_its_file_or_as_the_hub_converts_it(hub: Hub, tmp_path: Path) -> None:
    hub.add(
        "datasets/lab/cards",
        {
            "README.md": CARD,
            "easy/train-0.json": as_json(2),
            "easy/train-1.json": as_json(3),
            "easy/validation.json": as_json(4),
            "hard.jsonl": b"{}",
            "pictures.zip": b"large",
        },
    )
    hub.add("datasets/lab/program", {"program.py": b"raise SystemExit('run')", "all.csv": b"a,b"})
    hub.add("datasets/lab/program", {"default/train/0000.parquet": as_parquet(tmp_path, 2)}, "refs/convert/parquet")
    hub.add("datasets/lab/program-only", {"program-only.py": b"raise SystemExit('run')"})
    calls = [
        ("data", "lab/cards:easy"),
        ("data", "lab/cards:easy", "validation"),
        ("data", "lab/cards:easy:validation"),
        ("data", "lab/cards:hard"),
        ("data", "lab/cards:easy/train-1.json"),
        ("data", "lab/program"),
    ]
    found = ask(*calls, endpoint=hub.url, home=tmp_path)
    assert [[Path(file).name for file in files] for files in found] == [
        ["train-0.json", "train-1.json"],
        ["validation.json"],
        ["validation.json"],
        ["hard.jsonl"],
        ["train-1.json"],
        ["0000.parquet"],
    ]
    fetched = hub.downloads()
    assert not {"pictures.zip", "program.py", "all.csv"} & set(fetched) and set(fetched.values()) == {1}

    wrong = ["lab/cards", "lab/cards:middle", "lab/cards:hard:test", "lab/cards:nothing.json", "lab/program-only"]
    several, unknown, split, file, program = ask(*[("data", name) for name in wrong], endpoint=hub.url, home=tmp_path)
    assert "has several configurations; it has easy, hard (say which: lab/cards:easy)" in several
    assert "has no configuration 'middle'; it has easy, hard" in unknown
    assert "has no split 'test'; it has train (say which: lab/cards:hard:train)" in split
    assert "has no file nothing.json" in file
    assert "has no .json, .jsonl, .parquet, .csv, .tsv, or .json.gz, .jsonl.gz, .csv.gz, .tsv.gz files" in program


CODE_CONFIG = b"""
from transformers import LlamaConfig
class ToyConfig(LlamaConfig):
    model_type = "toy"
"""
CODE_MODEL = b"""
from transformers import LlamaForCausalLM
from .configuration_toy import ToyConfig
class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""


def test_a_models_own_code_is_fetched_at_its_revision_and_only_where_it_is_trusted(
    hub: Hub, base: Files, tmp_path: Path
) -> None:
    auto = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    config = {**json.loads(base["config.json"]), "model_type": "toy", "auto_map": auto}
    files = {**base, "config.json": json.dumps(config).encode(), "configuration_toy.py": CODE_CONFIG}
    pinned = hub.add("lab/toy", {**files, "modeling_toy.py": CODE_MODEL})
    hub.add("lab/toy", {**files, "modeling_toy.py": b"raise SystemExit('the newer code was run')"})
    (tmp_path / "data.json").write_bytes(as_json(25))
    (tmp_path / "run.json").write_text((ROOT / "configs/llama7b_dora.json").read_text())
    names = {"model.path": "lab/toy", "model.revision": pinned, "data.train": "data.json"}
    recipe = ["dora-dist", "train", "--config", "run.json", *small(**names)]

    refused = type_in(*recipe, endpoint=hub.url, home=tmp_path / "home", cwd=tmp_path)
    assert refused.returncode == 2 and "trust_remote_code" in refused.stderr, refused.stderr
    assert not any(re.search(r"\.py$", name) for name in hub.downloads())
    trusted = [*recipe, "--model.trust_remote_code", "true"]
    trained = type_in(*trusted, endpoint=hub.url, home=tmp_path / "home", cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert hub.downloads()["modeling_toy.py"] == hub.downloads()["configuration_toy.py"] == 1


def test_a_stream_of_the_hub_is_read_from_there_and_nothing_of_it_is_kept(hub: Hub, tmp_path: Path) -> None:
    rows = toy.records(40)
    lines = "".join(json.dumps(row) + "\n" for row in rows[20:]).encode()
    of_card = {
        "README.md": CARD,
        "easy/train-0.parquet": as_parquet(tmp_path, 20),
        "hard.jsonl": b"",
        "easy/validation.json": b"[]",
    }
    hub.add("datasets/lab/questions", {**of_card, "hard.jsonl": lines, "easy/train-1.jsonl.gz": gzip.compress(lines)})
    hub.add("datasets/lab/plain", {"data/train.csv": b"instruction,output\na,b\n", "data/test.csv": b"a\n1\n"})
    hub.breaks["hard.jsonl"] = [100]  # the client asks again
    calls = [("stream", "lab/questions:easy"), ("stream", "lab/questions:hard.jsonl"), ("stream", "lab/plain")]
    calls += [("stream", "lab/questions:easy:test"), ("stream", "lab/nothing")]
    easy, hard, plain, no_split, nothing = ask(*calls, endpoint=hub.url, home=tmp_path / "home")
    assert [row for _, row in easy] == [*rows[:20], *rows[20:]] and [row for _, row in hard] == rows[20:]
    assert easy[0][0] == "lab/questions:easy/train-0.parquet, record 1"
    assert hard[3][0] == "lab/questions:hard.jsonl, line 4"
    assert plain == [["lab/plain:data/train.csv, line 2", {"instruction": "a", "output": "b"}]]
    assert "has no split 'test'; it has train, validation" in no_split
    assert "the hub shows us no such data set" in nothing
    kept = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 10}
    assert kept.isdisjoint({"hard.jsonl", "train-0.parquet", "train-1.jsonl.gz", "train.csv"})
    (known,) = ask(("known", "lab/plain"), endpoint=hub.url, home=tmp_path / "home")
    hub.add("datasets/lab/plain", {"data/train.csv": b"instruction,output\na,b\n", "data/test.csv": b"a\n2\n"})
    (later,) = ask(("known", "lab/plain"), endpoint=hub.url, home=tmp_path / "home")
    assert len(known) == 1 and known[0][0] != later[0][0] and known[0][1] == later[0][1]
    offline = ask(("stream", "lab/plain"), endpoint=hub.url, home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert "could not be fetched" in offline[0] or "cannot be reached" in offline[0]
