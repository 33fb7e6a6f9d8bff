"""Whether an adapter and a base belong together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_dist.adapters.peft_folder import PeftFolder
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.weights.digest import sampled_digest, warn_of_another_base
from dora_dist.weights.safetensors_io import TensorFolder
from tests import toy


def digest(folder: Path) -> str:
    return sampled_digest(TensorFolder.open(folder))


def test_a_digest_knows_bytes_shapes_and_names_but_not_files(tmp_path: Path) -> None:
    def written(name: str, tensors: dict[str, torch.Tensor]) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return digest(tmp_path / name)

    tensors = {"a": torch.arange(3000.0).view(30, 100), "b": torch.zeros(0), "c": torch.ones(3, dtype=torch.int8)}
    found = written("plain", tensors)
    assert written("again", tensors) == found
    changed = tensors["a"].clone()
    changed[-1, -1] += 1
    others = [
        written("bytes", tensors | {"a": changed}),
        written("shape", tensors | {"a": tensors["a"].view(100, 30)}),
        written("dtype", tensors | {"a": tensors["a"].int()}),
        written("name", {name.upper(): values for name, values in tensors.items()}),
    ]
    assert len({found, *others}) == 5


def test_a_digest_is_the_same_for_one_file_and_for_many(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base")
    layer = AdapterLayer(torch.zeros(1, 36), torch.zeros(36, 1), None, 1.0)
    layers = {"model.layers.0.self_attn.q_proj": layer}  # zeros: the merged model is the base
    write_peft_folder(tmp_path / "adapter", PeftAdapter("base", 1, 1, 0.0, use_dora=False, layers=layers))
    consolidate(tmp_path / "adapter", base, tmp_path / "shards", max_shard_bytes=20_000, progress=False)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert digest(tmp_path / "shards") == digest(base)


def test_a_folder_keeps_the_digest_of_its_base(tmp_path: Path) -> None:
    layer = AdapterLayer(torch.zeros(1, 4), torch.zeros(3, 1), torch.ones(3), 1.0)
    adapter = PeftAdapter("base", 1, 1, 0.0, use_dora=True, layers={"m": layer}, base_digest="0123456789ab")
    write_peft_folder(tmp_path / "known", adapter)
    assert PeftFolder.open(tmp_path / "known").base_digest() == "0123456789ab"
    adapter.base_digest = ""
    write_peft_folder(tmp_path / "unknown", adapter)
    assert PeftFolder.open(tmp_path / "unknown").base_digest() == ""


@pytest.mark.parametrize(
    ("name", "digest", "base", "warns"),
    [
        ("org/llama-7b", "", "/models/llama-7b", False),
        ("org/llama-7b", "", "/cache/models--org--llama-7b/snapshots/0a1b", False),
        ("/models/LLaMA-7b/", "", "models/llama-7b", False),
        ("", "", "/models/llama-7b", False),
        ("org/llama-7b", "", "/models/llama-13b", True),
        ("org/llama-7b", "same", "/models/renamed", False),
        ("org/llama-7b", "other", "/models/llama-7b", True),
        ("", "other", "/models/llama-7b", True),
    ],
)
def test_another_base_is_told_by_its_digest_or_else_its_name(
    name: str, digest: str, base: str, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_another_base(Path("adapter"), name, digest, Path(base), "same")
    assert ("warning: adapter was trained" in capsys.readouterr().err) is warns
