"""Safetensors by byte range; the safetensors library is the oracle."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder
from dora_dist.weights.safetensors_io import DTYPES, TensorFolder, TensorWriter

# Everything that the library can write; complex64 it can only read.
TENSORS = {f"t.{n}": (torch.arange(-17, 18) * 3).view(5, 7).to(d) for n, d in DTYPES.items() if n != "C64"}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the last bit (float8 has no ==)."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tolist() == right.tolist()


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def failure(path: Path, stem: str = "model") -> str:
    with pytest.raises(UserError) as caught:
        TensorFolder.open(path, stem)
    return str(caught.value)


def test_reads_every_dtype_whole_and_in_part(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = TensorFolder.open(tmp_path)
    assert folder.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert same(folder.read(name), tensor)
        assert same(folder.read_flat(name, 3, 11), tensor.flatten()[3:11])
        assert same(folder.read_flat(name, 4, 4), tensor.flatten()[:0])
        assert same(folder.read(name, dtype=torch.float32), tensor.float())


def test_reads_only_the_bytes_asked_for_and_counts_them(tmp_path: Path) -> None:
    tensor = torch.randn(64, 33).to(torch.bfloat16)
    save_file({"a": torch.ones(5), "w": tensor, "z": torch.ones(3)}, tmp_path / "model.safetensors")
    folder = TensorFolder.open(tmp_path)
    out = torch.full((40,), 7.0, dtype=torch.bfloat16)
    folder.read_flat("w", 100, 120, out=out[10:30])
    assert torch.equal(out[10:30], tensor.flatten()[100:120])
    assert (out[:10] == 7).all() and (out[30:] == 7).all() and folder.bytes_read == 20 * 2
    shard = torch.nn.Parameter(torch.empty(20))  # a trainable shard of another dtype
    folder.read_flat("w", 100, 120, out=shard)
    assert torch.equal(shard.data, tensor.flatten()[100:120].float()) and folder.bytes_read == 40 * 2
    for start, stop in ((-1, 3), (5, 4), (0, 64 * 33 + 1)):
        with pytest.raises(ValueError, match="w: elements"):
            folder.read_flat("w", start, stop)
    with pytest.raises(ValueError, match="contiguous CPU tensor of shape"):
        folder.read_flat("w", 0, 10, out=torch.empty(20)[::2])


def test_conversion_goes_through_small_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_dist.weights.safetensors_io._STAGING_BYTES", 64)
    tensor = torch.randn(1000).to(torch.bfloat16)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    assert torch.equal(TensorFolder.open(tmp_path).read_flat("w", 7, 999, dtype=torch.float32), tensor[7:999].float())


def test_opens_shards_single_files_and_other_stems(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "unlisted": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "adapter.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = TensorFolder.open(tmp_path, stem="adapter")
    assert folder.entries.keys() == {"a", "b"} and torch.equal(folder.read("b"), torch.zeros(3))
    assert TensorFolder.open(tmp_path / "one.safetensors").entries.keys() == {"a", "unlisted"}
    assert "expected model.safetensors or model.safetensors.index.json" in failure(tmp_path)
    with pytest.raises(UserError, match="no tensor named 'c.weight'; did you mean 'b.weight'"):
        TensorFolder(tmp_path, {"b.weight": folder.entries["b"]}).read("c.weight")


def test_hub_caches_of_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs/0123")
    (tmp_path / "snapshot/model-1.safetensors").symlink_to("../blobs/0123")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "snapshot/model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(TensorFolder.open(tmp_path / "snapshot").read("a"), torch.ones(2))


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "..", "", "."])
def test_an_index_may_not_leave_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert f"tensor 'a' is said to be in {shard!r}; use a plain file name" in failure(tmp_path / "model")


def test_broken_indexes_name_file_and_tensor(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    for text in ("{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(text)
        assert "model.safetensors.index.json: not a safetensors index" in failure(tmp_path)
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    assert "two.safetensors: missing, and model.safetensors.index.json needs it for 'b'" in failure(tmp_path)
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}')
    assert "one.safetensors: tensor 'b' is not in it" in failure(tmp_path)


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(100)}, path)
    whole = path.read_bytes()
    for cut, message in [
        (0, "not a safetensors file, or truncated"),
        (7, "not a safetensors file, or truncated"),
        (20, "not a safetensors file, or truncated"),
        (len(whole) - 100, "truncated, 100 bytes of tensor 'b' are missing"),
        (len(whole) - 401, "truncated, 1 bytes of tensor 'a' are missing"),
    ]:
        path.write_bytes(whole[:cut])
        assert f"model.safetensors: {message}" in failure(tmp_path)
    path.write_bytes(whole + b"x")
    assert "1 bytes after the last tensor" in failure(tmp_path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a safetensors file, or truncated" in failure(tmp_path)
    path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights only" in failure(tmp_path)
    assert "nowhere: no such file or folder" in failure(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff\xfe{}", "header is not JSON"),
        (b"[" * 100_000, "header is not JSON"),
        ([], "header is not a JSON object"),
        ({"a": 3}, "malformed header entry of tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "malformed header entry of tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, "malformed header entry of tensor 'a'"),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, "'a' has the unsupported dtype 'F4'"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "'a' has the unsupported dtype"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "'a' of shape [3] does not fit"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, "'a' of shape [-2] does not fit"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "'a' of shape [2.0] does not fit"),
        (
            {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]}},
            "of tensor 'a' are missing",
        ),
        (
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            "'a' overlaps another or leaves a gap",
        ),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object, message: str) -> None:
    assert message in failure(write_raw(tmp_path / "model.safetensors", header, bytes(8)))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = write_raw(tmp_path / "model.safetensors", {"a": entry, "b": entry}, bytes(8))
    assert "'b' overlaps another" in failure(path)


def test_a_file_that_shrinks_while_read_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    folder = TensorFolder.open(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match="ended inside tensor 'a'"):
        folder.read("a")


def test_writer_makes_files_that_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = TENSORS | {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(6, 4).t(),
    }
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorWriter(path, layout, {"format": "pt"}) as writer:
        for name, tensor in reversed(tensors.items()):
            flat = tensor.flatten()
            writer.write(name, flat[:9])
            writer.write(name, flat[9:])
            assert not path.exists()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for entry in TensorFolder.open(path).entries.values():
        assert entry.offset % entry.dtype.itemsize == 0  # so that readers can map it


def test_writer_checks_what_it_is_given(tmp_path: Path) -> None:
    path, layout = tmp_path / "x.safetensors", [("a", torch.float32, (2, 3)), ("b", torch.int64, (1,))]
    with pytest.raises(ValueError, match="a: listed twice"):
        TensorWriter(path, layout[:1] * 2)
    with (
        pytest.raises(ValueError, match="a: declared as torch.float32, given torch.float64"),
        TensorWriter(path, layout) as writer,
    ):
        writer.write("a", torch.ones(2, 3, dtype=torch.float64))
    with (
        pytest.raises(ValueError, match="a: more elements than declared"),
        TensorWriter(path, layout) as writer,
    ):
        writer.write("a", torch.ones(7))
    with pytest.raises(ValueError, match=r"not written whole: \['b'\]"), TensorWriter(path, layout) as writer:
        writer.write("a", torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_writer_replaces_a_file_only_when_done(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)

    def interrupted() -> None:
        with TensorWriter(path, [("a", torch.float32, (2,))]) as writer:
            writer.write("a", torch.ones(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(load_file(path)["a"], torch.zeros(2)) and list(tmp_path.iterdir()) == [path]


FILL = """
import resource, signal, sys
from pathlib import Path
import torch
from dora_dist.runtime.folders import new_folder
from dora_dist.weights.safetensors_io import TensorWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if sys.argv[1] == "writer":
    with TensorWriter(Path("out.safetensors"), [("a", torch.float32, (50_000,))]) as writer:
        writer.write("a", torch.ones(50_000))
else:
    with new_folder(Path("out")) as folder:
        (folder / "big").write_bytes(bytes(200_000))
"""


@pytest.mark.parametrize("kind", ["writer", "folder"])
def test_a_write_that_the_system_refuses_says_so_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    """A file-size limit makes the system refuse in the middle of a write, as a full disk or quota does."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FILL, kind], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "UserError" in done.stderr and "cannot be written: File too large; free some space" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(UserError, match="x.safetensors: cannot be written: No space left on device"),
        TensorWriter(tmp_path / "x.safetensors", [("a", torch.float32, (2,))]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep/out"

    def fails_midway() -> None:
        with new_folder(out) as folder:
            (folder / "sub").mkdir()
            (folder / "sub/file").write_text("x")
            assert folder.parent == out.parent and not out.exists()
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fails_midway()
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "file").write_text("new")
    assert (out / "file").read_text() == "new" and list(out.parent.iterdir()) == [out]


def test_new_folder_overwrites_only_when_told_and_only_when_it_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(UserError, match="out: already exists"), new_folder(out):
        raise AssertionError("must not get here")
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True):
        raise RuntimeError
    assert (out / "old").exists()
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [out]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file: already exists; choose another"),
        new_folder(tmp_path / "file", overwrite=True),
    ):
        raise AssertionError("must not get here")
    with pytest.raises(UserError, match="file/out: cannot be written"), new_folder(tmp_path / "file/out"):
        raise AssertionError("must not get here")


def test_new_folder_lets_foreign_errors_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):  # of something read, not written
        (tmp_path / "nothing").read_text()


def test_reading_does_not_map_the_file(tmp_path: Path) -> None:
    """A read of 64 MB leaves no trace but its own result. (Pages of libraries come and go by the system's will.)"""
    save_file({"a": torch.zeros(16 << 20)}, tmp_path / "model.safetensors")
    folder = TensorFolder.open(tmp_path)
    out = torch.zeros(1 << 20)  # one for all: what an allocator keeps of freed memory is not what is tested
    before = held()
    for start in range(0, 16 << 20, 1 << 20):
        folder.read_flat("a", start, start + (1 << 20), out)
        assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    assert folder.bytes_read == 64 << 20
    assert held() - before < 16 << 20


def held() -> int:
    """Bytes of this process's own memory: anonymous pages, not those of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
