"""VL-BART on transformers' BART: an encoder that reads a text followed by visual features.

The model of Cho et al. (arXiv 2102.02779, section 3), as Sung et al. (arXiv 2112.06825) and Liu et al. (arXiv
2402.09353, section 5.3) adapt it. Decoder, `lm_head` and their tied token table are BART's own. Importing this file
registers it with transformers' Auto classes, so that these read a folder of `model_type` "vl_bart".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder, BartModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

_CAPTURED = ("output_attentions", "output_hidden_states")


class VLBartConfig(BartConfig):
    """A BART, the width of the visual features (`feature_dim`), and how many images a sample has at most (`images`)."""

    model_type = "vl_bart"

    feature_dim: int = 2048
    images: int = 2


class VisualEmbedding(nn.Module):
    """LN(W·features) + LN(U·(box, area)) + the image's embedding + the object's, which is passed in.

    The object's is a row of the token table, which is not part of this module: the module is trained, the table is not.
    LayerNorms have torch's eps of 1e-5, as BART's have, and both linear layers have a bias.
    """

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__()
        width = int(config.d_model or 0)
        self.features = nn.Linear(config.feature_dim, width)
        self.features_norm = nn.LayerNorm(width)
        self.boxes = nn.Linear(5, width)
        self.boxes_norm = nn.LayerNorm(width)
        self.images = nn.Embedding(config.images, width)

    def forward(self, features: Tensor, boxes: Tensor, images: Tensor, objects: Tensor) -> Tensor:
        """(b, v, d_model) embeddings of visual features.

        features (b, v, feature_dim) and boxes (b, v, 4), floating point of any width; images (b, v) int64; objects
        (b, v, d_model), the embeddings of the objects' numbers. A box is x1, y1, x2, y2 as shares of the image, and its
        area (x2 − x1)·(y2 − y1) is computed in its own dtype before it is rounded to the model's.
        """
        dtype = self.features.weight.dtype
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        places = torch.cat([boxes, area.unsqueeze(-1)], dim=-1)
        seen = self.features_norm(self.features(features.to(dtype)))
        located = self.boxes_norm(self.boxes(places.to(dtype)))
        return seen + located + self.images(images) + objects


class VLBartEncoder(BartEncoder):
    """BART's encoder over the layer-normed embeddings of the text, as BART has them, followed by the visual ones.

    BART's dropout of its input is over both. LayerDrop (`encoder_layerdrop`) is left out: with sharded weights, every
    process has to run every layer.
    """

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        visual_features: Tensor,
        visual_boxes: Tensor,
        visual_images: Tensor,
        visual_objects: Tensor,
        visual_mask: Tensor,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """States (b, t + v, d_model) of the text's t positions, then of the v visual ones.

        input_ids, attention_mask (b, t) and visual_images, visual_objects, visual_mask (b, v): integers; masks are 1
        where something is to be attended to. visual_features (b, v, feature_dim), visual_boxes (b, v, 4) in [0, 1].
        visual_images: which of the sample's images, visual_objects: which region of its image, both from 0.
        """
        # The rows of objects are the last of the token table, backwards. One lookup for both: sharded, the table is
        # then gathered once.
        objects = self.config.vocab_size - 1 - visual_objects
        looked_up = self.embed_tokens(torch.cat([input_ids, objects], dim=1))
        text, orders = looked_up.split([input_ids.shape[1], objects.shape[1]], dim=1)
        text = self.layernorm_embedding(text + self.embed_positions(input_ids))
        orders = orders / self.embed_tokens.embed_scale  # `scale_embedding` is of tokens
        visual = self.visual_embedding(visual_features, visual_boxes, visual_images, orders)
        states = nn.functional.dropout(torch.cat([text, visual], dim=1), self.dropout or 0.0, self.training)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=states, attention_mask=joined(attention_mask, visual_mask)
        )
        for layer in self.layers:
            states = layer(states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=states)


def joined(attention_mask: Tensor, visual_mask: Tensor) -> Tensor:
    """(b, t + v): the mask of all that the encoder reads."""
    return torch.cat([attention_mask, visual_mask.to(attention_mask.dtype)], dim=1)


class VLBartModel(BartModel):
    """BART with a `VLBartEncoder`; the decoder attends to the text's states and to the visual ones."""

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(config)
        self.encoder = VLBartEncoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As BART's, with the inputs of `VLBartEncoder.forward` besides.

        With `encoder_outputs`, no visual input is given, and attention_mask is of all of their positions, as in BART.
        """
        if encoder_outputs is None:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            visual = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("visual_")}
            captured = {name: kwargs[name] for name in _CAPTURED if name in kwargs}
            encoder_outputs = self.encoder(input_ids, attention_mask, **visual, **captured)
            attention_mask = joined(attention_mask, visual["visual_mask"])
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, encoder_outputs=encoder_outputs, **kwargs
        )


class VLBartForConditionalGeneration(BartForConditionalGeneration):
    """A `VLBartModel` that writes text, by `generate` as well; takes the inputs of its `forward`, and labels (b, l)."""

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(config)
        self.model = VLBartModel(config)
        self.post_init()

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *rest: Any
    ) -> dict[str, Any]:
        """Read text and visual features once; beams are copies of the encoder's states and of their joined mask."""
        prepare: Any = super()._maybe_prepare_encoder_kwargs_for_generation  # type: ignore[misc]
        read: dict[str, Any] = prepare(inputs_tensor, model_kwargs, *rest)
        visual = {name: read.pop(name) for name in list(read) if name.startswith("visual_")}
        if visual:
            read["attention_mask"] = joined(read["attention_mask"], visual["visual_mask"])
        return read


AutoConfig.register(VLBartConfig.model_type, VLBartConfig)
AutoModelForSeq2SeqLM.register(VLBartConfig, VLBartForConditionalGeneration)
