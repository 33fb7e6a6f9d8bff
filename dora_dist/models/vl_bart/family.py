"""BART and VL-BART as families: what trains by default, and how the first becomes the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_dist.models.family import Family
from dora_dist.models.logits import Logits, shifted
from dora_dist.runtime.errors import UserError

VISUAL_EMBEDDING = "visual_embedding"
"""The name of the module that is new in VL-BART."""


@dataclass(frozen=True)
class Bart(Family):
    """BART, of which a VL-BART is made where visual features follow the text."""

    def with_features(self, config: Any, feature_dim: int | None) -> Any:
        from dora_dist.models.vl_bart.modeling import VLBartConfig  # seconds

        width = {} if feature_dim is None else {"feature_dim": feature_dim}
        fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        made = VLBartConfig.from_dict({**fields, **width})
        made._name_or_path = config._name_or_path
        return made


@dataclass(frozen=True)
class VLBart(Family):
    """VL-BART (`modeling.py`) as Liu et al. (arXiv 2402.09353, section 5.3) train it.

    They train all biases and LayerNorms besides, which `adapter.trained_parameters` names.
    """

    model_types: tuple[str, ...] = ("vl_bart",)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    parts: tuple[str, ...] = (VISUAL_EMBEDDING,)
    apart: tuple[str, ...] = (VISUAL_EMBEDDING,)
    trained: tuple[str, ...] = (VISUAL_EMBEDDING,)
    reads_features: bool = True
    logits: Logits | None = shifted

    def with_features(self, config: Any, feature_dim: int | None) -> Any:
        if feature_dim not in (None, config.feature_dim):
            raise UserError(
                f"model.feature_dim = {feature_dim}: {config._name_or_path} reads features of width "
                f"{config.feature_dim}; set it to null and give such features, or start from a plain BART"
            )
        return config

    def feature_dim_of(self, trained: Mapping[str, Sequence[int]]) -> int | None:
        ending = f"{VISUAL_EMBEDDING}.features.weight"
        return next((shape[1] for name, shape in trained.items() if name.endswith(ending)), None)


VL_BART = VLBart()
