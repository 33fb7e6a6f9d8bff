"""PEFT adapter folders, read and written whole: adapter_config.json + adapter_model.safetensors.

PEFT keeps lora_A as (r, in), lora_B as (out, r) and the whole magnitude m (not an offset), and merges as
W = (m / n)[:, None]·(W0 + s·B·A) with n the row norms of the bracket: the same function as here, save that it
divides by n even where n is 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.adapter_folder import MODEL_CONFIG_NAME, AdapterFields, described, trained_of
from dora_dist.adapters.method import AdapterMethod
from dora_dist.adapters.methods import of_peft
from dora_dist.adapters.peft_config import CONFIG_NAME, NO_TARGETS, peft_type
from dora_dist.adapters.peft_folder import (
    BASE_DIGEST,
    BASE_LAYER,
    BASE_PACKED,
    BASE_STORAGE,
    PARAMETERS,
    PREFIX,
    WEIGHTS_STEM,
    PeftFolder,
    saved_module,
    warn_of_magnitudes,
)
from dora_dist.adapters.peft_layer import AdapterLayer, VeraLayer
from dora_dist.adapters.peft_vera import PROJECTION_DIGEST, VeraFolder
from dora_dist.adapters.storage import PLAIN
from dora_dist.runtime.folders import new_folder, write_json
from dora_dist.weights.safetensors_io import TensorWriter


@dataclass
class PeftAdapter(AdapterFields):
    """An adapter; `layers` maps module names of the base model to their parameters, in memory or made when asked for.

    `lora_alpha` and `r` are the defaults that single layers may depart from; `use_rslora`: scaling is lora_alpha /
    sqrt(r), else lora_alpha / r. `all_biases` says that every bias of the
    model was trained, `source` is the folder that it was read from.
    """

    base_model: str
    lora_alpha: float
    r: int
    dropout: float
    use_dora: bool
    layers: Mapping[str, AdapterLayer]
    all_biases: bool = False
    use_rslora: bool = False
    source: PeftFolder | None = None

    def methods(self) -> dict[str, AdapterMethod]:
        """The method of each module, with its own rank and scaling."""
        return {name: of_peft(layer, self.dropout) for name, layer in self.layers.items()}

    def differences(self, module: str, method: AdapterMethod) -> Iterator[str]:
        """Why `module` cannot be the start of a layer with `method`, each with a remedy."""
        theirs = self.layers[module]
        if theirs.magnitude is not None and not method.weight_decomposed:
            yield "it is DoRA (set adapter.weight_decomposed to true)"
        yield from method.differences(theirs)

    def values(self, module: str, method: AdapterMethod, base_norm: Tensor | None) -> dict[str, Tensor]:
        """Values of the parameters of a layer with `method`, which gives the function that `module` has here."""
        return method.from_peft(self.layers[module], base_norm)

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the folder `path` (`write_peft_folder`)."""
        write_peft_folder(path, self, overwrite=overwrite)


def open_peft_folder(path: Path) -> PeftFolder:
    """Check a PEFT folder of either kind without reading it. Raises UserError, naming file and field."""
    kind = VeraFolder if peft_type(Path(path) / CONFIG_NAME) == VeraLayer.peft_type else PeftFolder
    return kind.open(path)


def read_peft_folder(path: Path) -> PeftAdapter:
    """Read a PEFT folder of LoRA or DoRA, with its rank_pattern, alpha_pattern and use_rslora, or of VeRA.

    Raises UserError, naming file and field, for anything that the adapters here cannot express.
    """
    folder = open_peft_folder(path).checked()
    layers = {module: folder.layer(module) for module in folder.modules}
    warn_of_magnitudes(folder.path, {module: layer.odd_magnitudes() for module, layer in layers.items()})
    return PeftAdapter(
        lora_alpha=folder.lora_alpha,
        r=folder.config["r"],
        dropout=folder.dropout,
        use_dora=bool(folder.config.get("use_dora")),
        use_rslora=bool(folder.config.get("use_rslora")),
        layers=layers,
        trained=dict(trained_of(folder)),
        source=folder,
        **described(folder),
    )


def write_peft_folder(
    path: Path, adapter: PeftAdapter, dtype: torch.dtype = torch.float32, overwrite: bool = False
) -> None:
    """Write `adapter` so that peft.PeftModel.from_pretrained computes the same function.

    `dtype` is that of lora_A and lora_B; magnitudes stay fp32, as rounding them would move every weight. A
    magnitude-only module becomes a rank-one LoRA whose B is zero, which is how PEFT can express it. All layers
    must have a magnitude when `use_dora`, none otherwise (ValueError). UserError when `path` exists, unless
    `overwrite`. Layers are asked for twice, one at a time.
    """
    outlines = {module: layer.outline() for module, layer in adapter.layers.items()}
    vera = {module: layer for module, layer in outlines.items() if isinstance(layer, VeraLayer)}
    fields = _vera_fields(adapter, vera) if vera else _lora_fields(adapter, outlines)
    tensors = {n: t for module, layer in outlines.items() for n, t in _tensors(module, layer, dtype).items()}
    trained = {name: _stored_name(name, outlines) for name in (*adapter.trained, *adapter.stored)}
    tensors |= {trained[name]: values.float() for name, values in adapter.trained.items()}
    config = {
        **fields,
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model or None,
        "revision": adapter.revision,
        "r": adapter.r,
        "target_modules": sorted(outlines) or NO_TARGETS,
        "modules_to_save": adapter.modules_to_save or None,
        "bias": "all" if adapter.all_biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    metadata = {"format": "pt", **({BASE_DIGEST: adapter.base_digest} if adapter.base_digest else {})}
    if adapter.base_storage != PLAIN.name:
        metadata |= {BASE_STORAGE: adapter.base_storage, BASE_PACKED: json.dumps(adapter.base_packed)}
    if digest := next((layer.projection_digest for layer in vera.values()), ""):
        metadata[PROJECTION_DIGEST] = digest
    if single := [stored for name, stored in trained.items() if saved_module(name, adapter.modules_to_save) is None]:
        metadata[PARAMETERS] = json.dumps(single)
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    for name, (source, theirs) in adapter.stored.items():
        layout.append((trained[name], torch.float32, source.entry(theirs).shape))
    with new_folder(path, overwrite) as folder:
        with TensorWriter(folder / f"{WEIGHTS_STEM}.safetensors", layout, metadata) as writer:
            for module, layer in adapter.layers.items():
                for name, tensor in _tensors(module, layer, dtype).items():
                    writer.write(name, tensor)
            for name in adapter.trained:
                writer.write(trained[name], tensors[trained[name]])
            for name, (source, theirs) in adapter.stored.items():
                for piece in source.in_pieces(theirs, dtype=torch.float32):
                    writer.write(trained[name], piece)
        write_json(folder / CONFIG_NAME, config)
        if adapter.model_config:
            write_json(folder / MODEL_CONFIG_NAME, adapter.model_config)


def _tensors(module: str, layer: AdapterLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors by their names in the file: LoRA's factors in `dtype`, all else fp32."""
    if isinstance(layer, VeraLayer):
        vectors = {"vera_lambda_d": layer.lambda_d, "vera_lambda_b": layer.lambda_b}
        return {f"{PREFIX}{module}.{kind}": vector.float() for kind, vector in vectors.items()}
    lora_A, lora_B = (factor.to(dtype) for factor in layer.stored_factors(module))
    found = {f"{PREFIX}{module}.lora_A.weight": lora_A, f"{PREFIX}{module}.lora_B.weight": lora_B}
    if layer.magnitude is not None:
        found[f"{PREFIX}{module}.lora_magnitude_vector"] = layer.magnitude.float()
    return found


def _lora_fields(adapter: PeftAdapter, outlines: Mapping[str, AdapterLayer]) -> dict[str, Any]:
    """Fields of the configuration that LoRA has."""
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for module, layer in outlines.items():
        if (layer.magnitude is not None) != adapter.use_dora:
            raise ValueError(f"{module}: use_dora={adapter.use_dora} holds for all layers of a PEFT adapter")
        r = layer.stored_factors(module)[0].shape[0]
        alpha = layer.scaling * (math.sqrt(r) if adapter.use_rslora else r)
        if r != adapter.r:
            rank_pattern[f"^{module}"] = r  # anchored: PEFT would also match it as another name's ending
        if not math.isclose(alpha, adapter.lora_alpha, rel_tol=1e-9) and layer.lora_A is not None:
            alpha_pattern[f"^{module}"] = _whole(alpha)
    return {
        "peft_type": AdapterLayer.peft_type,
        "lora_alpha": _whole(adapter.lora_alpha),
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.use_dora,
        "use_rslora": adapter.use_rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _vera_fields(adapter: PeftAdapter, outlines: Mapping[str, VeraLayer]) -> dict[str, Any]:
    """Fields of the configuration that VeRA has; PEFT draws the matrices from the key."""
    keys = {layer.prng_key for layer in outlines.values()}
    if len(keys) != 1 or len(outlines) < len(adapter.layers):
        raise ValueError(f"layers with several keys {sorted(keys)}: all of a PEFT adapter share one pair of matrices")
    return {
        "peft_type": VeraLayer.peft_type,
        "projection_prng_key": keys.pop(),
        "save_projection": False,
        "vera_dropout": adapter.dropout,
    }


def _stored_name(parameter: str, adapted: Container[str]) -> str:
    """What PEFT's wrapped model calls a parameter of the base: its adapted layers hold the base's one."""
    module, _, own = parameter.rpartition(".")
    return f"{PREFIX}{module}.{BASE_LAYER}.{own}" if module in adapted else f"{PREFIX}{parameter}"


def _whole(number: float) -> float:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
