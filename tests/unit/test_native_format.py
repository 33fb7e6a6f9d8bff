"""Our own adapter folder: what is written is read, merged and put on a base as it was; what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_dist.adapters.folders import open_adapter, read_adapter
from dora_dist.adapters.method import AdapterMethod
from dora_dist.adapters.methods import LowRank, Mora, NoUpdate, WeightDecomposed
from dora_dist.adapters.native_format import CONFIG_NAME, NativeAdapter, NativeLayer
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.runtime.errors import UserError
from tests import toy

QUERY, DOWN, GATE = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"
SHAPES = {QUERY: (36, 36), DOWN: (36, 53), GATE: (53, 36)}
METHODS: dict[str, AdapterMethod] = {
    QUERY: WeightDecomposed(LowRank(3, 6.0, dropout=0.1)),
    DOWN: LowRank(2, 6.0),
    GATE: WeightDecomposed(NoUpdate()),
}


def adapter(base: Path) -> NativeAdapter:
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    layers = {
        name: NativeLayer(
            method, SHAPES[name], {kind: random(i.shape) for kind, i in method.parameters(SHAPES[name]).items()}
        )
        for name, method in METHODS.items()
    }
    return NativeAdapter(
        base_model=str(base),
        layers=layers,
        modules_to_save=["model.norm"],
        trained={"model.norm.weight": random((36,))},
    )


def merged_by_formula(base: dict[str, Tensor], of: NativeAdapter) -> dict[str, Tensor]:
    whole = {name: values.double() for name, values in base.items()} | {n: v.double() for n, v in of.trained.items()}
    for name, layer in of.layers.items():
        w, own = whole[f"{name}.weight"], {kind: values.double() for kind, values in layer.values.items()}
        v = w + layer.method.scaling * own["lora_B"] @ own["lora_A"].T if "lora_A" in own else w
        if "magnitude_offset" in own:
            v = ((w.norm(dim=1) + own["magnitude_offset"]) / v.norm(dim=1))[:, None] * v
        whole[f"{name}.weight"] = v
    return whole


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.base_model(tmp_path_factory.mktemp("native") / "base")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    adapter(base).write(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_written_folder_is_read_back_bit_for_bit_and_is_no_peft_folder(base: Path, folder: Path) -> None:
    written, read = adapter(base), read_adapter(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.safetensors", CONFIG_NAME]
    assert read.methods() == METHODS
    assert (read.base_model, read.modules_to_save, read.task_type) == (str(base), ["model.norm"], "CAUSAL_LM")
    for name, layer in written.layers.items():
        values = read.values(name, METHODS[name], None)
        assert all(torch.equal(values[kind], own) for kind, own in layer.values.items())
        assert list(read.differences(name, METHODS[name])) == []
    assert list(read.differences(DOWN, LowRank(4, 6.0))) == ["its r is 2, adapter.r = 4 (set it to 2)"]
    [other] = read.differences(DOWN, Mora(r=2))
    assert other.startswith("its method is 'lora', this run's 'mora'")
    alone = "it trains a magnitude alone there (name it in adapter.magnitude_only_modules)"
    assert list(read.differences(GATE, METHODS[QUERY])) == [alone]
    also = "it trains an update there (take it out of adapter.magnitude_only_modules)"
    assert list(read.differences(QUERY, METHODS[GATE])) == [also]
    assert torch.equal(read.trained["model.norm.weight"], written.trained["model.norm.weight"])


def test_merged_and_unmerged_are_the_formulas(base: Path, folder: Path, tmp_path: Path) -> None:
    consolidate(folder, base, tmp_path / "merged", progress=False)
    expected = merged_by_formula(load_file(base / "model.safetensors"), adapter(base))
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert toy.relative_error(found[name], values) < 1e-6, name
    logits = []
    for path in (tmp_path / "merged", folder):
        with torch.no_grad():
            logits.append(load_for_inference(str(path), "fp32")[0].cpu()(toy.tokens()).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def rewritten(folder: Path, **changes: Any) -> None:
    """`...` takes a key out."""
    file = folder / CONFIG_NAME
    changed = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))


def changed_layer(folder: Path, **changes: Any) -> None:
    layers = json.loads((folder / CONFIG_NAME).read_text())["layers"]
    layers[DOWN]["method"] |= changes
    rewritten(folder, layers=layers)


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    del tensors[f"{DOWN}.lora_B"]
    save_file(tensors, folder / "adapter.safetensors")


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    tensors[f"{DOWN}.lora_B"][0, 0] = torch.nan
    save_file(tensors, folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: rewritten(folder, format=7), "format = 7, this version reads 1"),
        (lambda folder: rewritten(folder, trained="x"), "trained = 'x' is not what belongs there"),
        (
            lambda folder: rewritten(folder, layers={"a": {"shape": [0, 1], "method": {}}}),
            "must have a shape [out, in]",
        ),
        (
            lambda folder: changed_layer(folder, method="absent"),
            "= 'absent': there is no such method here; name the module",
        ),
        (lambda folder: changed_layer(folder, method=[]), "= []: there is no such method here"),
        (lambda folder: changed_layer(folder, r="2"), "not settings of the method 'lora'"),
        (lambda folder: changed_layer(folder, r=-5), "not settings of the method 'lora'"),
        (lambda folder: changed_layer(folder, dropout="0.1"), "not settings of the method 'lora'"),
        (lambda folder: changed_layer(folder, lora_alpha=True), "not settings of the method 'lora'"),
        (lambda folder: rewritten(folder, revision=...), "revision = None is not what belongs there"),
        (lambda folder: rewritten(folder, trained=...), "trained = None is not what belongs there"),
        (lambda folder: changed_layer(folder, beta=1), "not settings of the method 'lora'"),
        (
            lambda folder: changed_layer(folder, r=4),
            f"tensor '{DOWN}.lora_A' is float32 (53, 2), but must be fp32 (53, 4)",
        ),
        (
            lambda folder: rewritten(folder, trained=[]),
            "'model.norm.weight' is there, which dora_dist_adapter.json does",
        ),
        (without_a_tensor, f"tensor '{DOWN}.lora_B' is missing"),
        (not_finite, f"tensor '{DOWN}.lora_B' holds 1 numbers that are NaN"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder: Path, damage: Any, says: str) -> None:
    damage(folder)
    with pytest.raises(UserError) as caught:
        opened = open_adapter(folder)
        opened.layer(DOWN)
    assert says in str(caught.value)
