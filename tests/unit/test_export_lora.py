"""`export --to lora`: the nearest LoRA, what it loses on weights and logits, and that other programs read it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_dist import cli
from dora_dist.adapters.peft_format import PeftAdapter, read_peft_folder, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.checkpoint.nearest_lora import nearest
from dora_dist.evaluation.export_lora import export_lora
from dora_dist.runtime.errors import UserError
from dora_dist.weights.safetensors_io import TensorFolder
from tests import toy

MODULES = {"model.layers.0.self_attn.q_proj": (36, 36), "model.layers.1.mlp.down_proj": (36, 53)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`base`, and `adapter`, a DoRA of rank 2 whose magnitudes are off the row norms by some percent."""
    toy.base_model(tmp_path / "base")
    base, draw = TensorFolder.open(tmp_path / "base"), torch.Generator().manual_seed(0)
    layers = {}
    for name, (rows, columns) in MODULES.items():
        norm = base.read_finite(f"{name}.weight").norm(dim=1)
        A, B = torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw) * 0.1
        layers[name] = AdapterLayer(A, B, norm * (1 + 0.1 * torch.rand(rows, generator=draw)), 1.0)
    write_peft_folder(tmp_path / "adapter", PeftAdapter(str(tmp_path / "base"), 2, 2, 0.0, True, layers))
    return tmp_path


def change(folder: Path, module: str) -> torch.Tensor:
    """What the adapter adds to a weight, from the merged folder."""
    if not (folder / "merged").exists():
        consolidate(folder / "adapter", folder / "base", folder / "merged", progress=False)
    merged, base = (TensorFolder.open(folder / name).read_finite(f"{module}.weight") for name in ("merged", "base"))
    return merged - base


def test_each_layer_is_the_nearest_of_its_rank(folder: Path) -> None:
    """By the singular values of the difference of two folders, in fp64."""
    result = export_lora(folder / "adapter", folder / "lora", r=4, max_error=1.0, progress=False)
    written = read_peft_folder(folder / "lora")
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert not config.get("use_dora") and written.layers.keys() == MODULES.keys()
    total = torch.zeros(2, dtype=torch.float64)
    for module in MODULES:
        difference, layer = change(folder, module).double(), written.layers[module]
        assert layer.lora_A is not None and layer.lora_B is not None and layer.magnitude is None
        least = torch.linalg.svdvals(difference)[4:].square().sum()
        found = (difference - layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).square().sum()
        assert float(found) == pytest.approx(float(least), rel=1e-3)
        assert result["errors"][module] == pytest.approx(float((least / difference.square().sum()).sqrt()), rel=1e-3)
        total += torch.stack([least, difference.square().sum()])
    assert result["error"] == pytest.approx(float((total[0] / total[1]).sqrt()), rel=1e-3)
    assert 0 < result["logits"]["lost"] < 1


def test_with_its_whole_rank_nothing_is_lost_and_peft_computes_it(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = export_lora(folder / "adapter", folder / "lora", r=36, progress=False)
    assert result["error"] < 1e-5 and result["logits"]["lost"] < 1e-4 and result["logits"]["agreement"] == 1.0
    change(folder, next(iter(MODULES)))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    plain = base(toy.tokens()).logits
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")(toy.tokens()).logits
    peft = PeftModel.from_pretrained(base, str(folder / "lora"))(toy.tokens()).logits
    assert (peft - merged).abs().max() < 1e-4 < (plain - merged).abs().max() / 10


def test_of_a_base_held_in_few_bits_it_is_the_change_of_what_training_saw(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The LoRA says how its base is held, too; logits are those of the packed base with each."""
    theirs = replace(read_peft_folder(folder / "adapter"), base_storage="int8")
    write_peft_folder(folder / "packed", theirs)
    result = export_lora(folder / "packed", folder / "lora", r=36, progress=False)
    assert result["error"] < 1e-5 and result["logits"]["lost"] < 1e-4
    assert read_peft_folder(folder / "lora").base_storage == "int8"
    told = " ".join(capsys.readouterr().err.split())
    assert "note: The base was held as int8 in training. PEFT, and servers that read its folders, take the base" in told
    assert "held as int8 in training. PEFT, and servers" in (folder / "lora" / "README.md").read_text()
    written, plain = read_peft_folder(folder / "lora").layers, read_peft_folder(folder / "adapter")
    export_lora(folder / "adapter", folder / "other", r=36, logits=False, progress=False)
    other = read_peft_folder(folder / "other").layers
    module = next(iter(plain.layers))
    ours, others = (layers[module] for layers in (written, other))
    assert ours.lora_A is not None and others.lora_A is not None
    assert ours.lora_B is not None and others.lora_B is not None
    assert not torch.allclose(ours.lora_B @ ours.lora_A, others.lora_B @ others.lora_A, rtol=1e-4)


def test_a_layer_that_stayed_plain_beside_a_packed_one_changes_as_training_saw_it(folder: Path) -> None:
    packed, plain = MODULES
    theirs = read_peft_folder(folder / "adapter")
    write_peft_folder(folder / "mixed", replace(theirs, base_storage="nf4", base_packed=[packed]))
    for name in ("mixed", "adapter"):
        export_lora(folder / name, folder / f"of_{name}", r=36, logits=False, progress=False)
    ours, others = (read_peft_folder(folder / f"of_{name}").layers for name in ("mixed", "adapter"))
    for module, same in ((packed, False), (plain, True)):
        products = [layer.lora_B @ layer.lora_A for layer in (ours[module], others[module])]
        assert torch.equal(*products) == same


def test_the_random_projection_comes_close_to_the_exact_decomposition() -> None:
    """Of a difference such as DoRA's: a weight whose rows are scaled, and a large part of low rank."""
    draw = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(300, 400, generator=draw), 0.02 * torch.randn(300, 1, generator=draw)
    low = torch.randn(300, 8, generator=draw) @ torch.randn(8, 400, generator=draw)
    for r in (4, 8, 32):
        exact, fast = (nearest(scale * weight + low, r, exact=exact) for exact in (True, False))
        assert exact.lost <= fast.lost * (1 + 1e-5) and fast.lost <= 1.02 * exact.lost
    first, again = (nearest(scale * weight + low, 8, exact=False) for _ in range(2))
    assert torch.equal(first.lora_A, again.lora_A)
    assert nearest(torch.zeros(5, 7), 3).error == 0.0


def test_what_loses_much_is_refused_unless_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "export",
        str(folder / "adapter"),
        "--to",
        "lora",
        "--rank",
        "1",
        "--output",
        str(folder / "lora"),
    ]
    assert cli.main([*line, "--max-error", "0.01"]) == 2
    said = capsys.readouterr().err
    assert "--rank 1: the nearest LoRA loses" in said and "more than --max-error 0.01" in said and "--force" in said
    assert not (folder / "lora").exists()
    with pytest.raises(UserError, match="of the adapter's change of the weights"):
        export_lora(folder / "adapter", folder / "lora", r=1, max_error=0.01, logits=False, progress=False)
    assert cli.main([*line, "--max-error", "0.01", "--force", "--no-logits"]) == 0
    assert "all weights" in capsys.readouterr().out
    assert "the nearest LoRA of rank 1 to its adapter" in (folder / "lora" / "README.md").read_text()
