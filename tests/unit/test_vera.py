"""VeRA's shared matrices: PEFT's numbers, in memory once, gone with the model."""

import gc
import json
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_dist import cli
from dora_dist.adapters.folders import read_adapter
from dora_dist.adapters.inject import by_pattern, inject
from dora_dist.adapters.layer import AdaptedLinear, adapted_layers
from dora_dist.adapters.method import AdapterMethod
from dora_dist.adapters.methods import Vera, WeightDecomposed, chosen
from dora_dist.adapters.native_format import NativeAdapter, NativeLayer
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.peft_format import PeftAdapter
from dora_dist.adapters.peft_layer import VeraLayer
from dora_dist.adapters.projection import Projection
from dora_dist.checkpoint import format
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.checkpoint.export import export_peft
from dora_dist.checkpoint.format import identity
from dora_dist.config import AdapterConfig, ModelConfig
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.runtime.errors import UserError
from dora_dist.training.model import build_model
from tests import toy

R = 5
TARGETS = ["q_proj", "v_proj", "down_proj"]


def model() -> Any:
    return nn.ModuleDict({"q": nn.Linear(16, 24), "up": nn.Linear(16, 40), "down": nn.Linear(40, 16)})


def toy_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**toy.SIZES, vocab_size=300))


@pytest.mark.parametrize("key", [0, 7])
def test_the_matrices_are_those_that_peft_draws(key: int) -> None:
    generator = torch.Generator("cpu").manual_seed(key)
    A, B = (_kaiming_init(shape, generator) for shape in ((R, 40), (24, R)))
    drawn = Projection.over([(16, 40), (24, 16)], key=key, r=R).drawn()
    assert torch.equal(drawn[0], A)
    assert torch.equal(drawn[1], B)


def test_what_torch_draws_has_not_changed() -> None:
    """Adapters on disk hold the key alone: with other numbers they would mean another function."""
    A, B = Projection(0, 4, (6, 8)).drawn()
    assert A[0, :3].tolist() == [-0.006483776494860649, 0.46457377076148987, -0.7127779722213745]
    assert B[-1, :2].tolist() == [0.4860794246196747, 0.16545428335666656]


def projection_of(layer: AdaptedLinear) -> Projection:
    update: Any = layer.method.update if isinstance(layer.method, WeightDecomposed) else layer.method
    assert isinstance(update.projection, Projection)
    return update.projection


@pytest.mark.parametrize("decomposed", [False, True])
def test_all_layers_of_a_model_share_them(decomposed: bool) -> None:
    whole, update = model(), Vera(r=R)
    inject(whole, by_pattern(WeightDecomposed(update) if decomposed else update, ["q", "up", "down"]))
    layers = list(adapted_layers(whole).values())
    shared = projection_of(layers[0])
    assert len(layers) == 3
    assert all(projection_of(layer) is shared for layer in layers)
    assert shared.widest == (40, 40)
    places = {tuple(view.data_ptr() for view in shared.views(layer.shape, layer.weight)) for layer in layers}
    assert len(places) == 1
    assert not any(parameter.numel() >= 16 * R for layer in layers for parameter in layer.adapter_parameters().values())


def test_they_go_with_the_model() -> None:
    whole = model()
    inject(whole, by_pattern(Vera(r=R), ["q", "up", "down"]))
    whole.q(torch.ones(2, 16)).sum().backward()
    gone = weakref.ref(projection_of(whole.q))
    del whole
    gc.collect()
    assert gone() is None


class Decomposed(nn.Module):
    """A magnitude by hand over PEFT's VeRA layer: W = (m / n)·(W0 + ΔW), n detached (Liu et al., section 4.3)."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs
        self.magnitude = nn.Parameter(theirs.base_layer.weight.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        whole = self.theirs.base_layer.weight + self.theirs.get_delta_weight("default")
        return x @ ((self.magnitude / whole.norm(dim=1).detach())[:, None] * whole).T


@pytest.mark.parametrize("decomposed", [False, True])
def test_twenty_steps_follow_peft(decomposed: bool) -> None:
    from peft import VeraConfig, get_peft_model

    ours, theirs = toy_llama(), toy_llama()
    update = Vera(r=R, projection_prng_key=3)
    inject(ours, by_pattern(WeightDecomposed(update) if decomposed else update, TARGETS))
    for layer in adapted_layers(ours).values():
        own = layer.adapter_parameters()
        for name, initial in layer.method.parameters(layer.shape).items():
            nn.init.constant_(own[name], initial.value)
    NormRefresher(ours)
    peft = get_peft_model(theirs, VeraConfig(r=R, target_modules=TARGETS, projection_prng_key=3, save_projection=False))
    if decomposed:
        for name, module in list(peft.named_modules()):
            if hasattr(module, "get_delta_weight"):
                parent, _, child = name.rpartition(".")
                setattr(peft.get_submodule(parent), child, Decomposed(module))
    losses = []
    for whole in (ours, peft):
        trained = [p for p in whole.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
        for step in range(20):
            tokens = toy.tokens() + step % 3
            loss = whole(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:20] == pytest.approx(losses[20:], abs=1e-5)
    assert abs(losses[0] - losses[18]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"projection_prng_key": "x"}, "projection_prng_key = 'x' must be a whole number from"),
        ({"projection_prng_key": 2**63}, "projection_prng_key = 9223372036854775808 must be a whole number from"),
        ({"d_initial": 0.0}, "d_initial = 0.0 must be a number other than 0"),
        ({"d_initial": "x"}, "d_initial = 'x' must be a number"),
        ({"projection": None}, "'projection' is not a setting of the method 'vera'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        chosen(AdapterConfig(method="vera", settings=settings))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toy.base_model(tmp_path / "base")


def peft_folder(folder: Path, base: Path, **options: Any) -> Tensor:
    """A VeRA of PEFT's, with random vectors; returns its logits."""
    from peft import VeraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = VeraConfig(task_type="CAUSAL_LM", **{"r": R, "target_modules": TARGETS, **options})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.randn_like(parameter))
        adapted.save_pretrained(folder)
        logits: Tensor = adapted(toy.tokens()).logits
    return logits


def logits_of(path: Path, base: Path | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = load_for_inference(str(path), "fp32", str(base) if base else None)[0](toy.tokens()).logits
    return logits


@pytest.mark.parametrize("save_projection", [False, True])
def test_peft_folders_are_read_merged_and_written(tmp_path: Path, base: Path, save_projection: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = peft_folder(tmp_path / "theirs", base, save_projection=save_projection, projection_prng_key=5)
    torch.testing.assert_close(logits_of(tmp_path / "theirs", base), expected, atol=1e-5, rtol=0)
    consolidate(tmp_path / "theirs", base, tmp_path / "merged", progress=False)
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, atol=1e-4, rtol=0)

    adapter = read_adapter(tmp_path / "theirs")
    adapter.write(tmp_path / "ours")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(toy.tokens()).logits, expected, atol=1e-6, rtol=0)
    assert set(load_file(tmp_path / "ours/adapter_model.safetensors")) == {
        f"base_model.model.{module}.vera_lambda_{part}" for module in adapter.layers for part in "db"
    }


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"projection_prng_key": 1}, "'base_model.vera_A' is not what PEFT draws for projection_prng_key=1"),
        ({"projection_prng_key": "x"}, "projection_prng_key='x' must be a whole number"),
        ({"r": R + 1}, r"has lambda_b \(36,\), lambda_d \(5,\); with r=6 it must have"),
        ({"vera_dropout": 2}, "vera_dropout=2 must be a number from 0 to 1"),
        ({"bias": "some"}, "bias='some' is not supported"),
        ({"lora_alpha": 8}, "lora_alpha=8 is not supported"),
    ],
)
def test_what_a_folder_says_and_is_not_so_is_refused(tmp_path: Path, base: Path, spoil: Any, says: str) -> None:
    peft_folder(tmp_path / "theirs", base, save_projection=True)
    file = tmp_path / "theirs/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | spoil))
    with pytest.raises(UserError, match=says):
        read_adapter(tmp_path / "theirs")
    with pytest.raises(UserError, match=says):
        consolidate(tmp_path / "theirs", base, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "vera", "settings": {"projection_prng_key": 4}}, None),
        ({"method": "vera"}, r"its projection_prng_key is 4, adapter.settings has 0 \(set it to 4\)"),
        ({"method": "vera", "settings": {"projection_prng_key": 4}, "r": 8}, r"its r is 5, adapter.r = 8"),
        ({"method": None}, r'it is VeRA \(set adapter.method to "vera"\)'),
        ({"method": "vera", "weight_decomposed": True}, r"it is VeRA \(set adapter.weight_decomposed to false\)"),
    ],
)
def test_a_run_starts_from_a_peft_folder_of_its_own_kind(tmp_path: Path, base: Path, section: Any, says: Any) -> None:
    expected = peft_folder(tmp_path / "theirs", base, projection_prng_key=4)
    own = {"r": R, "weight_decomposed": False, "target_modules": TARGETS, "init_from": str(tmp_path / "theirs")}
    start = partial(build_model, ModelConfig(path=str(base), dtype="fp32"), AdapterConfig(**(own | section)))
    if says is not None:
        with pytest.raises(UserError, match=says):
            start()
        return
    with torch.no_grad():
        torch.testing.assert_close(start().model(toy.tokens()).logits, expected, atol=1e-5, rtol=0)


def test_a_dvora_is_small_on_disk_and_exported_exactly(tmp_path: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    section = AdapterConfig(method="vera", r=64, target_modules=TARGETS, settings={"projection_prng_key": 2})
    ours = build_model(ModelConfig(path=str(base), dtype="fp32"), section)
    layers = adapted_layers(ours.model)
    with torch.no_grad():
        for parameter in (p for layer in layers.values() for p in layer.adapter_parameters().values()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ours.norms.mark_stale()
        expected = ours.model(toy.tokens()).logits
    values = {name: {k: p.detach() for k, p in layer.adapter_parameters().items()} for name, layer in layers.items()}
    native = {name: NativeLayer(layer.method, layer.shape, values[name]) for name, layer in layers.items()}
    NativeAdapter(base_model=str(base), layers=native).write(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter.safetensors").stat().st_size < 4 * 64 * 36  # of one shared matrix
    torch.testing.assert_close(logits_of(tmp_path / "adapter"), expected, atol=1e-5, rtol=0)
    consolidate(tmp_path / "adapter", base, tmp_path / "merged", progress=False)
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, atol=1e-4, rtol=0)

    assert cli.main(["export-peft", str(tmp_path / "adapter"), "--output", str(tmp_path / "peft")]) == 0
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(toy.tokens()).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="not an adapter in our own format"):
        export_peft(tmp_path / "peft", base, tmp_path / "again")


def test_what_starts_from_one_may_have_other_first_values(base: Path) -> None:
    method = WeightDecomposed(Vera(r=R)).for_model([(36, 36)])
    values = {kind: torch.ones(initial.shape) for kind, initial in method.parameters((36, 36)).items()}
    adapter = NativeAdapter(base_model=str(base), layers={"q": NativeLayer(method, (36, 36), values)})
    other = WeightDecomposed(Vera(r=R, d_initial=0.2, dropout=0.5), "adapter").for_model([(36, 36)])
    assert list(adapter.differences("q", other)) == []
    [key] = adapter.differences("q", WeightDecomposed(Vera(r=R, projection_prng_key=2)).for_model([(36, 36)]))
    assert key.startswith("its projection_prng_key is 0, adapter.settings: projection_prng_key = 2")


def test_an_export_holds_one_layer_in_pefts_form_at_a_time(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a base that was packed in training, too; then it says how PEFT's differs."""
    method = WeightDecomposed(Vera(r=R)).for_model([(36, 36)])
    shapes = {f"model.layers.{n}.self_attn.{kind}_proj": (36, 36) for n in range(2) for kind in "qo"}
    layers = {
        name: NativeLayer(method, shape, {k: torch.randn(i.shape) for k, i in method.parameters(shape).items()})
        for name, shape in shapes.items()
    }
    packed: dict[str, Any] = {"base_storage": "int8", "base_packed": list(shapes)}
    NativeAdapter(base_model=str(base), layers=layers, **packed).write(tmp_path / "adapter")
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, make = 0, VeraLayer.low_rank

    def counted(layer: VeraLayer, in_features: int) -> Any:
        nonlocal most
        made = make(layer, in_features)
        alive.add(made.lora_A)
        most = max(most, len(alive))
        return made

    with patch.object(VeraLayer, "low_rank", counted):
        assert export_peft(tmp_path / "adapter", base, tmp_path / "peft") == 4
    assert most <= 2  # the one before is let go of when the next one is there
    assert "note: The base was held as int8 in training. PEFT" in " ".join(capsys.readouterr().err.split())


def another_torch() -> Any:
    """A torch that draws other numbers from the same key."""
    drawn = Projection.drawn
    return patch.object(Projection, "drawn", lambda self: tuple(matrix.neg() for matrix in drawn(self)))


def test_vectors_that_were_trained_with_other_matrices_are_refused(tmp_path: Path, base: Path) -> None:
    """In our own format, in PEFT's where we wrote it, and on resuming; PEFT's own folders say nothing."""
    start = partial(build_model, ModelConfig(path=str(base), dtype="fp32"))
    section = {"method": "vera", "r": R, "target_modules": TARGETS}
    for decomposed in (True, False):
        ours = start(AdapterConfig(**section, weight_decomposed=decomposed)).model
        layers = adapted_layers(ours)
        folder = tmp_path / f"adapter-{decomposed}"
        values = {n: {k: p.detach() for k, p in layer.adapter_parameters().items()} for n, layer in layers.items()}
        if decomposed:
            native = {n: NativeLayer(layer.method, layer.shape, values[n]) for n, layer in layers.items()}
            NativeAdapter(base_model=str(base), layers=native).write(folder)
        else:
            theirs = {n: layer.method.to_peft(layer.shape, values[n], None) for n, layer in layers.items()}
            peft = {n: layer for n, layer in theirs.items() if layer is not None}
            PeftAdapter(str(base), float(R), R, 0.0, False, peft).write(folder)
        again = {**section, "weight_decomposed": decomposed, "init_from": str(folder)}
        start(AdapterConfig(**again))
        kept = identity(ours, {})
        assert len(kept["shared"]) == 1
        manifest = {"model": kept}
        format._check_identity(tmp_path, manifest, ours)
        with another_torch():
            with pytest.raises(UserError, match=r"shared matrices|what the layers of DVoRA share is not"):
                start(AdapterConfig(**again))
            with pytest.raises(UserError, match=r"shared matrices|what the layers of DVoRA share is not"):
                consolidate(folder, base, tmp_path / "merged", progress=False)
            other = start(AdapterConfig(**section, weight_decomposed=decomposed)).model
            with pytest.raises(UserError, match="resume with the torch of then"):
                format._check_identity(tmp_path, manifest, other)
        del manifest["model"]["shared"]  # as earlier versions wrote it
        format._check_identity(tmp_path, manifest, ours)
    peft_folder(tmp_path / "theirs", base, save_projection=False)
    with another_torch():
        read_adapter(tmp_path / "theirs")


def test_an_export_says_that_all_biases_were_trained_and_replaces_adapters_alone(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = toy.base_model(tmp_path / "base", attention_bias=True)
    biases = {name: values + 1 for name, values in load_file(base / "model.safetensors").items() if "bias" in name}
    shape = (36, 36)
    method = chosen(AdapterConfig(method="vera", r=R))
    assert isinstance(method, AdapterMethod)
    method = method.for_model([shape])
    values = {kind: torch.full(fill[0], 0.1) for kind, fill in method.parameters(shape).items()}
    layers = {"model.layers.0.self_attn.q_proj": NativeLayer(method, shape, values)}
    NativeAdapter(base_model=str(base), layers=layers, trained=biases).write(tmp_path / "adapter")
    for _ in range(2):  # an adapter may be replaced
        export_peft(tmp_path / "adapter", base, tmp_path / "peft", overwrite=True)
    checkpoint = tmp_path / "run/checkpoint-2"
    shutil.copytree(tmp_path / "peft", checkpoint / "adapter")
    (checkpoint / "manifest.json").write_text("{}")
    (tmp_path / "run/config.json").write_text("{}")
    refused = {"base": "holds the base", "adapter": "holds the adapter", "run": "does not hold an adapter"}
    refused |= {"run/checkpoint-2": "named as a run's", "run/checkpoint-2/adapter": "lies in the checkpoint"}
    before = {name: sorted((tmp_path / name).rglob("*")) for name in refused}
    for name, says in refused.items():
        with pytest.raises(UserError, match=says):
            export_peft(tmp_path / "adapter", base, tmp_path / name, overwrite=True)
        assert sorted((tmp_path / name).rglob("*")) == before[name]

    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["bias"] == "all"
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    peft.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again.eval()(toy.tokens()).logits, peft.eval()(toy.tokens()).logits)
