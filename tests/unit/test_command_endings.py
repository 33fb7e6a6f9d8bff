"""How `evaluate` and `consolidate` end as processes: asked to stop, their reader gone, the disk full."""

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.runtime.exit_codes import DONE, INTERRUPTED, STOPPED, USERS_MISTAKE
from tests import toy
from tests.ranks import context
from tests.terminal import Terminal

WIDTH, ROWS = 1024, 1 << 20  # 2 GiB in bf16: sparse on disk, and long to copy
QUERY = "model.layers.0.self_attn.q_proj"


def _command(folder: str, words: list[str], file_bytes: int | None, reader_gone: bool) -> None:
    """In a process of its own: `dora-dist` with these words; what it prints goes to the files "out" and "err"."""
    from dora_dist import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    os.chdir(folder)
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)
    reading, writing = os.pipe()
    os.dup2(writing if reader_gone else os.open("out", os.O_WRONLY | os.O_CREAT), 1)
    os.close(reading)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    cli.run(words)


@contextmanager
def command(
    folder: Path, *words: str, file_bytes: int | None = None, reader_gone: bool = False
) -> Iterator[BaseProcess]:
    process = context().Process(target=_command, args=(str(folder), list(words), file_bytes, reader_gone))
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def ended(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def wait_until(process: BaseProcess, found: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.is_alive() and time.monotonic() < deadline, "it ended too early, or never came so far"
        time.sleep(0.01)


def said(folder: Path) -> str:
    return (folder / "err").read_text() if (folder / "err").exists() else ""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"out", "err"}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with a tensor that takes long to copy, and `adapter` on another one of its modules."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    header, position = {}, 0
    for name, shape in ((f"{QUERY}.weight", [8, 8]), ("embedding", [ROWS, WIDTH])):
        end = position + shape[0] * shape[1] * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    head = json.dumps(header).encode()
    with (folder / "base/model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + position)
    layer = AdapterLayer(torch.ones(2, 8), torch.ones(8, 2), torch.ones(8), 1.0)
    write_peft_folder(folder / "adapter", PeftAdapter("base", 2, 2, 0.0, True, {QUERY: layer}))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter` and `boolq.json` with many questions."""
    folder = tmp_path_factory.mktemp("small")
    toy.base_model(folder / "base")
    toy.write_records(folder / "boolq.json", 5000)
    layer = AdapterLayer(torch.ones(2, 36), torch.ones(36, 2), torch.ones(36), 1.0)
    write_peft_folder(folder / "adapter", PeftAdapter("base", 2, 2, 0.0, True, {QUERY: layer}))
    return folder


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, INTERRUPTED, "interrupted\n"),
        (signal.SIGTERM, STOPPED, "stopped: SIGTERM: nothing was written\n"),
    ],
)
def test_a_merge_that_is_stopped_leaves_nothing(number: int, code: int, words: str, large: Path) -> None:
    before = names(large)
    with command(large, "consolidate", "adapter", "--output", "merged") as process:
        wait_until(process, lambda: [*large.glob(".merged.partial-*/.*model.safetensors*")])
        os.kill(process.pid or 0, number)
        assert ended(process) == code, said(large)
    assert said(large).endswith(words)
    assert "Traceback" not in said(large)
    assert names(large) == before
    (large / "err").unlink()


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, INTERRUPTED, "interrupted\n"),
        (signal.SIGTERM, STOPPED, "stopped: SIGTERM: nothing was written\n"),
    ],
)
def test_an_evaluation_that_is_stopped_says_so_and_writes_nothing(
    number: int, code: int, words: str, small: Path
) -> None:
    before = names(small)
    line = ["evaluate", "base", "--tasks", "boolq=boolq.json", "--batch-size", "1", "--output", "result.json"]
    terminal = Terminal(100, ["dora-dist", *line], folder=small)
    terminal.until(lambda text: re.search(r"\| [1-9]\d*/5000", text))
    terminal.send(number)
    assert terminal.end() == code, terminal.text
    assert terminal.text.endswith(words)
    assert "Traceback" not in terminal.text and "accuracy" not in terminal.text
    assert names(small) == before


def test_a_reader_that_has_gone_ends_an_evaluation_quietly_with_its_file(small: Path, tmp_path: Path) -> None:
    line = ["evaluate", "base", "--tasks", "boolq=boolq.json", "--mode", "likelihood", "--limit", "2"]
    with command(small, *line, "--output", str(tmp_path / "result.json"), reader_gone=True) as process:
        assert ended(process) == DONE, said(small)
    assert "Error" not in said(small)
    assert json.loads((tmp_path / "result.json").read_text())["tasks"]["boolq"]["total"] == 2
    (small / "err").unlink()


def test_a_model_that_cannot_be_written_whole_is_not_left(small: Path, tmp_path: Path) -> None:
    words = ["consolidate", "adapter", "--output", str(tmp_path / "merged")]
    with command(small, *words, file_bytes=20_000) as process:
        assert ended(process) == USERS_MISTAKE, said(small)
    assert "cannot be written: File too large" in said(small)
    assert "Traceback" not in said(small)
    assert [*tmp_path.iterdir()] == []
    for name in ("out", "err"):
        (small / name).unlink()
