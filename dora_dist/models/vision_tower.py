"""A vision tower's folder: its configuration, what its pictures look like, and the tower as it computes features."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.models.folder import DTYPES, ModelFolder, reason, transformers_config
from dora_dist.models.reading import read_model
from dora_dist.runtime.errors import UserError

_MEANS_AND_STDS = {
    "clip_vision_model": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip_vision_model": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "dinov2_with_registers": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
"""What towers were trained with; used where a folder lacks preprocessor_config.json."""
_PROJECTION = "visual_projection.weight"
"""CLIP's, from its tower into the space that it shares with texts."""


def tower_config(folder: Path, option: str) -> Any:
    """The configuration of the tower in a folder: of a tower, or of a model with one (CLIP, SigLIP, LLaVA).

    `option` named the folder. Raises UserError for a model without a tower.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    whole = transformers_config(folder)
    config = whole.vision_config if "vision_config" in whole.sub_configs else whole
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if model_class is None or model_class.main_input_name != "pixel_values":
        raise UserError(f"{option} {folder}: {config.model_type!r} is not a vision tower")
    return config


def preprocessing(folder: Path, model_type: str, option: str) -> dict[str, Any]:
    """The mean, deviation, resampling and side length ("side") that the tower's pictures had."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        if model_type not in _MEANS_AND_STDS:
            raise UserError(f"{option} {folder}: no {file.name} in it, which says how its pictures are normalised")
        mean, std = _MEANS_AND_STDS[model_type]
        return {"image_mean": mean, "image_std": std}
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    crops = settings.get("do_center_crop", "crop_size" in settings)
    size = settings.get("crop_size" if crops else "size") or {}
    return {**settings, "side": size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")}


def square_processor(settings: dict[str, Any], side: int, *, pad: bool) -> Any:
    """The image processor that makes squares of `side` pixels by `preprocessing`'s settings: of the whole picture,
    padded (LLaVA-1.5's), or of its middle (CLIP's)."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil(
        do_pad=pad,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        **{key: settings[key] for key in ("image_mean", "image_std", "resample") if key in settings},
    )


@dataclass(frozen=True)
class VisionTower:
    """A tower in evaluation mode. `side` is the height and width in pixels of what it sees.

    named: what the user calls "tower", "layer" and "image_size", for messages.
    """

    model: Any
    processor: Any
    side: int
    named: Callable[[str], str] = str

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        dtype: str,
        side: int | None = None,
        pad: bool = True,
        named: Callable[[str], str] = str,
    ) -> VisionTower:
        """The tower in a folder; `side` in place of the folder's, `pad` as of `square_processor`."""
        from transformers import CLIPVisionModelWithProjection
        from transformers.models.auto.modeling_auto import MODEL_MAPPING

        option = named("tower")
        opened, config = ModelFolder.open(folder, option), tower_config(folder, option)
        projects = config.model_type == "clip_vision_model" and _PROJECTION in opened.tensors.entries
        if projects and "projection_dim" in opened.config:
            config.projection_dim = opened.config["projection_dim"]  # the tower's own section may leave it at a default
        model_class = CLIPVisionModelWithProjection if projects else MODEL_MAPPING[type(config)]
        model, _ = read_model(opened, model_class, dtype=DTYPES[dtype], config=config)
        settings = preprocessing(folder, config.model_type, option)
        side = side or settings.get("side") or config.to_dict().get("image_size")
        if side is None:
            raise UserError(f"{option} {folder}: does not say how large its pictures are; give {named('image_size')}")
        model = model.eval().requires_grad_(False)
        return cls(model, square_processor(settings, side, pad=pad), side, named)

    def settings(self) -> dict[str, Any]:
        """How pictures become what it sees, as JSON."""
        made = self.processor.to_dict()
        normalised = {key: list(made[key]) for key in ("image_mean", "image_std")}
        return {"image_size": self.side, **normalised, "resample": int(made["resample"])}

    def patches(self, pixels: Tensor, layer: int) -> Tensor:
        """(b, d, rows, columns): what a layer's patches are, without class token and registers.

        pixels: (b, 3, side, side). layer: as LLaVA counts, 0 the embeddings, -1 the last layer (before its final
        norm); of a convolutional tower: its stages.
        """
        hidden = self._run(pixels, output_hidden_states=True).hidden_states
        if not -len(hidden) <= layer < len(hidden):
            raise UserError(
                f"{self.named('layer')} {layer}: the tower has {len(hidden) - 1} layers; give -{len(hidden)} to "
                f"{len(hidden) - 1}, where 0 are the embeddings and -1 is the last layer"
            )
        values: Tensor = hidden[layer]
        if values.ndim == 4:
            return values
        rows, columns = self._patch_grid(pixels)
        if values.shape[1] < rows * columns:
            raise UserError(
                f"{self.named('tower')}: layer {layer} has {values.shape[1]} features a picture, where its patches are "
                f"{rows} x {columns}; towers that merge patches are not read: give another tower"
            )
        return values[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))

    def embedding(self, pixels: Tensor) -> Tensor:
        """(b, d): one vector a picture. CLIP's with its projection where the folder has it, else the pooled output."""
        output = self._run(pixels)
        vector = output.image_embeds if "image_embeds" in output else output.get("pooler_output")
        if vector is None:
            raise UserError(
                f"{self.named('tower')}: {type(self.model).__name__} has no pooled output; give another tower"
            )
        return vector.flatten(1)

    def _run(self, pixels: Tensor, **options: Any) -> Any:
        try:
            with torch.no_grad():
                return self.model(pixels.to(self.model.device, self.model.dtype), **options)
        except ValueError as error:
            raise UserError(
                f"{self.named('tower')}: refuses pictures of {self.side} x {self.side} pixels: {reason(error)}; give "
                f"another {self.named('image_size')}, or none"
            ) from error

    def _patch_grid(self, pixels: Tensor) -> tuple[int, int]:
        size = self.model.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return pixels.shape[-2] // height, pixels.shape[-1] // width
