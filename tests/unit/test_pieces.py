"""Tensors in pieces: whatever way they are cut, any range reads as from the whole."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dora_dist.adapters.native_format import NativeAdapter
from dora_dist.adapters.peft_format import PeftAdapter
from dora_dist.checkpoint.manifest import FORMAT_OF_SHARDS, Damaged, file_entry, read_manifest, write_manifest
from dora_dist.checkpoint.state import KEYS, STATE, Masters, open_files, open_state, state_file
from dora_dist.runtime.errors import UserError
from dora_dist.weights import pieces
from dora_dist.weights.pieces import PiecedFolder
from dora_dist.weights.safetensors_io import read_header

WHOLE = {"matrix": torch.arange(35.0).view(5, 7), "vector": torch.arange(3.0).neg(), "scalar": torch.tensor(4.5)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}


def cut(folder: Path, count: int) -> list[Any]:
    """Headers of `WHOLE` as the ranks of a world of `count` hold it; one without elements of a tensor lacks it."""
    headers = []
    for number in range(count):
        tensors = {}
        for name, tensor in WHOLE.items():
            length = -(-tensor.numel() // count)
            if (piece := tensor.flatten()[number * length : (number + 1) * length]).numel():
                tensors[name] = piece.contiguous()
        save_file(tensors, folder / f"{number}.safetensors")
        headers.append(read_header(folder / f"{number}.safetensors"))
    return headers


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_range_reads_as_from_the_whole(tmp_path: Path, count: int) -> None:
    folder = PiecedFolder.of_headers(tmp_path, cut(tmp_path, count), SHAPES)
    assert {name: entry.shape for name, entry in folder.entries.items()} == SHAPES
    for name, tensor in WHOLE.items():
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.read(name, dtype=torch.float64), tensor.double())
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                assert torch.equal(folder.read_flat(name, start, stop), tensor.flatten()[start:stop])


def test_a_file_is_opened_once_and_closed_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> list[str]:
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sorted(Path(link).name for link in links if link.startswith(str(tmp_path)))

    folder = PiecedFolder.of_headers(tmp_path, cut(tmp_path, 3), SHAPES)
    for _ in range(2):
        assert torch.equal(folder.read("matrix"), WHOLE["matrix"])
        assert opened() == ["0.safetensors", "1.safetensors", "2.safetensors"]
    del folder
    assert opened() == []
    monkeypatch.setattr(pieces, "_OPEN_FILES", 2)
    folder = PiecedFolder.of_headers(tmp_path, cut(tmp_path, 3), SHAPES)
    assert torch.equal(folder.read("matrix"), WHOLE["matrix"])
    assert opened() == ["1.safetensors", "2.safetensors"]


def test_pieces_that_are_not_the_whole_are_refused_by_name(tmp_path: Path) -> None:
    headers = cut(tmp_path, 2)
    with pytest.raises(UserError, match="1 files hold 18 elements of 'matrix', which has 35"):
        PiecedFolder.of_headers(tmp_path, headers[:1], SHAPES)
    with pytest.raises(UserError, match="hold 0 elements of 'other', which has 2"):
        PiecedFolder.of_headers(tmp_path, headers, {**SHAPES, "other": (2,)})


def test_a_checkpoint_is_read_alike_whether_one_file_holds_its_state_or_several(tmp_path: Path) -> None:
    state = {f"{name}.{key}": tensor + place for name, tensor in WHOLE.items() for place, key in enumerate(KEYS)}
    fields = {"step": 2, "model": {"trainable": SHAPES}}
    one, several = tmp_path / "one" / "checkpoint-2", tmp_path / "several" / "checkpoint-2"
    one.mkdir(parents=True)
    several.mkdir(parents=True)
    save_file(state, one / STATE)
    write_manifest(one, fields)
    for rank in range(3):
        cuts = {name: tensor.flatten().tensor_split(3)[rank].contiguous() for name, tensor in state.items()}
        save_file(cuts, several / state_file(rank, 3))
    write_manifest(several, fields, form=FORMAT_OF_SHARDS)
    for folder in (one, several):
        opened = open_state(folder)
        assert opened.entries.keys() == state.keys()
        assert all(torch.equal(opened.read(name), tensor) for name, tensor in state.items())
        masters = Masters(opened)
        assert sorted(masters) == sorted(WHOLE) and "matrix" in masters and "matrix.master" not in masters
        assert torch.equal(masters["matrix"], WHOLE["matrix"])
        assert torch.equal(opened.read_flat(masters.stored("matrix"), 10, 30), WHOLE["matrix"].flatten()[10:30])


def test_a_state_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for rank in range(3):
        save_file({"scalar": torch.ones(1)}, folder / state_file(rank, 3))
    write_manifest(folder, {"step": 2}, form=FORMAT_OF_SHARDS)
    damaged = folder / state_file(1, 3)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + b"\x55")
    with pytest.raises(Damaged, match="state-00002-of-00003.safetensors is damaged"):
        read_manifest(folder)
    damaged.unlink()
    with pytest.raises(Damaged, match="state-00002-of-00003.safetensors is missing"):
        read_manifest(folder)
    with pytest.raises(UserError, match="holds 2 of 3 state files"):
        open_files(folder, [state_file(0, 3), state_file(2, 3)], shapes=SHAPES)


def test_what_other_ranks_wrote_is_listed_though_the_folders_listing_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [state_file(rank, 2) for rank in range(2)]
    for name in names:
        save_file({"scalar": torch.ones(1)}, tmp_path / name)
    known = {name: file_entry(tmp_path / name) for name in names}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rglob", lambda self, pattern: iter([tmp_path / names[0]]))
        write_manifest(tmp_path, {"step": 2}, known=known)
    assert list(read_manifest(tmp_path)["files"]) == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match="state-00002-of-00002.safetensors is not there for rank 0.*all nodes share"):
        write_manifest(tmp_path, {"step": 2}, known=known)


@pytest.mark.parametrize("kind", [PeftAdapter, NativeAdapter])
def test_what_was_trained_in_full_is_copied_out_of_a_state_as_it_would_be_written_from_memory(
    tmp_path: Path, kind: Any
) -> None:
    state = {f"head.{name}.{key}": tensor.clone() for name, tensor in WHOLE.items() for key in KEYS}
    for rank in range(2):
        cuts = {name: tensor.flatten().tensor_split(2)[rank].contiguous() for name, tensor in state.items()}
        save_file(cuts, tmp_path / state_file(rank, 2))
    names, shapes = [state_file(rank, 2) for rank in range(2)], {f"head.{n}": shape for n, shape in SHAPES.items()}
    masters = Masters(open_files(tmp_path, names, shapes=shapes))
    own = {"lora_alpha": 2.0, "r": 2, "dropout": 0.0, "use_dora": False} if kind is PeftAdapter else {}
    common = {"base_model": "base", "layers": {}, "modules_to_save": ["head"], **own}
    kind(**common, trained=dict(masters)).write(tmp_path / "memory")
    kind(**common, stored={name: (masters.state, masters.stored(name)) for name in masters}).write(tmp_path / "state")
    written, copied = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("memory", "state"))
    assert written == copied and len(written) == 2
