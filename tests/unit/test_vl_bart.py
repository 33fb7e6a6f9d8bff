"""VL-BART's model against its formulas, written out here: embeddings, encoder, decoder, masks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from tests import vl_bart
from tests.toy import relative_error

# --- the formulas -----------------------------------------------------------------------------------------------------


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def attention(weights: dict[str, Tensor], name: str, x: Tensor, seen: Tensor, allowed: Tensor) -> Tensor:
    """allowed (b, queries, keys), with four heads."""
    heads = [
        linear(weights, f"{name}.{part}_proj", y).unflatten(-1, (4, -1)).transpose(1, 2)
        for part, y in (("q", x), ("k", seen), ("v", seen))
    ]
    scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(heads[0].shape[-1])
    shares = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    return linear(weights, f"{name}.out_proj", (shares @ heads[2]).transpose(1, 2).flatten(2))


def feed_forward(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    inner = linear(weights, f"{name}.fc1", x)
    return linear(weights, f"{name}.fc2", inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))


def encoder_input(weights: dict[str, Tensor], batch: dict[str, Tensor], scale: float) -> Tensor:
    """Liu et al., section 5.3: layer-normed text, then features, boxes with their areas, image order, object order.

    scale: of the tokens' embeddings alone.
    """
    table, positions = weights["model.shared.weight"], weights["model.encoder.embed_positions.weight"]
    length, own = batch["input_ids"].shape[1], "model.encoder.visual_embedding"
    tokens = scale * table[batch["input_ids"]]
    text = norm(weights, "model.encoder.layernorm_embedding", tokens + positions[2 : 2 + length])
    left, top, right, bottom = batch["visual_boxes"].to(table.dtype).unbind(-1)
    places = torch.stack([left, top, right, bottom, (right - left) * (bottom - top)], dim=-1)
    visual = (
        norm(
            weights,
            f"{own}.features_norm",
            linear(weights, f"{own}.features", batch["visual_features"].to(table.dtype)),
        )
        + norm(weights, f"{own}.boxes_norm", linear(weights, f"{own}.boxes", places))
        + weights[f"{own}.images.weight"][batch["visual_images"]]
        + table.flip(0)[batch["visual_objects"]]
    )
    return torch.cat([text, visual], dim=1)


def formula(model: Any, batch: dict[str, Tensor], written: Tensor, scale: float = 1.0) -> Tensor:
    """Logits (b, l, vocabulary) after the decoder's input `written` (b, l), from a model's weights."""
    weights, layers = model.state_dict(), range(2)
    x = encoder_input(weights, batch, scale)
    keys = torch.cat([batch["attention_mask"], batch["visual_mask"]], dim=1).bool()[:, None]
    for name in (f"model.encoder.layers.{i}" for i in layers):
        seen = attention(weights, f"{name}.self_attn", x, x, keys.expand(-1, x.shape[1], -1))
        x = norm(weights, f"{name}.self_attn_layer_norm", x + seen)
        x = norm(weights, f"{name}.final_layer_norm", x + feed_forward(weights, name, x))
    table, positions = weights["model.shared.weight"], weights["model.decoder.embed_positions.weight"]
    length = written.shape[1]
    y = norm(weights, "model.decoder.layernorm_embedding", scale * table[written] + positions[2 : 2 + length])
    before = torch.ones(length, length).tril().bool().expand(len(written), -1, -1)
    for name in (f"model.decoder.layers.{i}" for i in layers):
        y = norm(weights, f"{name}.self_attn_layer_norm", y + attention(weights, f"{name}.self_attn", y, y, before))
        seen = attention(weights, f"{name}.encoder_attn", y, x, keys.expand(-1, length, -1))
        y = norm(weights, f"{name}.encoder_attn_layer_norm", y + seen)
        y = norm(weights, f"{name}.final_layer_norm", y + feed_forward(weights, name, y))
    return y @ table.T + weights["final_logits_bias"]


def padded() -> dict[str, Tensor]:
    """A batch whose rows differ in the lengths of their texts and in their numbers of features."""
    batch = vl_bart.batch()
    batch["attention_mask"][0, 4:] = 0
    batch["visual_mask"][1, 3:] = 0
    return batch


def _in_fp64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.double() if values.is_floating_point() else values for name, values in batch.items()}


WRITTEN = torch.tensor([[2, 5, 9, 11, 4]]).repeat(3, 1)

# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_logits_follow_the_formulas(dtype: torch.dtype, bound: float, attn_implementation: str) -> None:
    model, batch = vl_bart.model().to(dtype), _in_fp64(padded())
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=WRITTEN).logits
        expected = formula(model.double(), batch, WRITTEN)
    assert logits.dtype == dtype and relative_error(logits, expected) < bound


def test_bart_scales_the_embeddings_of_tokens_and_not_those_of_objects() -> None:
    model, batch = vl_bart.model(scale_embedding=True).double(), _in_fp64(padded())
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=WRITTEN).logits
        expected = formula(model, batch, WRITTEN, scale=math.sqrt(model.config.d_model))
    assert relative_error(logits, expected) < 1e-12


def test_gradients_reach_the_visual_embedding_as_the_formulas_have_them() -> None:
    model, batch = vl_bart.model().double(), _in_fp64(padded())
    labels = WRITTEN.roll(-1, 1)
    own = {name: p for name, p in model.named_parameters() if "visual_embedding" in name}
    found = torch.autograd.grad(model(**batch, labels=labels, decoder_input_ids=WRITTEN).loss, list(own.values()))
    weights = {**model.state_dict(), **own}
    logits = formula(_Weights(weights), batch, WRITTEN)
    expected = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), list(own.values()))
    assert len(own) == 9
    for name, one, other in zip(own, found, expected, strict=True):
        assert relative_error(one, other) < 1e-10, name


class _Weights:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def state_dict(self) -> dict[str, Tensor]:
        return self._weights


def test_padding_of_text_and_features_changes_nothing() -> None:
    model, batch = vl_bart.model().double(), vl_bart.batch()
    wider = vl_bart.batch(text=9, visual=7, seed=2)
    for name, values in batch.items():
        wider[name][:, : values.shape[1]] = values
    wider["attention_mask"][:, 6:], wider["visual_mask"][:, 4:] = 0, 0
    with torch.no_grad():
        logits = [model(**inputs, decoder_input_ids=WRITTEN).logits for inputs in (batch, wider)]
    assert relative_error(logits[1], logits[0]) < 1e-12


def test_two_images_of_a_sample_are_told_apart_by_their_order_alone() -> None:
    model, batch = vl_bart.model().double(), vl_bart.batch()
    swapped = {
        name: values[:, [2, 3, 0, 1]] if name.startswith("visual_") else values for name, values in batch.items()
    }
    exchanged = {**batch, "visual_images": 1 - batch["visual_images"]}
    with torch.no_grad():
        logits = [model(**inputs, decoder_input_ids=WRITTEN).logits for inputs in (batch, swapped, exchanged)]
    assert relative_error(logits[1], logits[0]) < 1e-12  # where features stand in the sequence means nothing
    assert relative_error(logits[2], logits[0]) > 1e-4


def test_beams_of_a_batch_are_those_of_each_sample_by_itself() -> None:
    model, batch = vl_bart.model(), padded()
    settings = {"num_beams": 5, "max_new_tokens": 7, "num_return_sequences": 5, "return_dict_in_generate": True}
    together = model.generate(**batch, **settings, output_scores=True)
    for row in range(3):
        kept = {
            name: values[row : row + 1][
                :, batch["attention_mask" if values.shape[1] == 6 else "visual_mask"][row].bool()
            ]
            for name, values in batch.items()
        }
        alone = model.generate(**kept, **settings, output_scores=True)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[5 * row : 5 * row + 5, :length], alone.sequences)
        assert torch.allclose(together.sequences_scores[5 * row : 5 * row + 5], alone.sequences_scores, atol=1e-5)


def test_its_folder_loads_by_the_auto_class(tmp_path: Path) -> None:
    model, batch = vl_bart.model(), padded()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = [m(**batch, decoder_input_ids=WRITTEN).logits for m in (model, loaded)]
    assert torch.equal(*logits)


def test_a_missing_input_is_named() -> None:
    batch = vl_bart.batch()
    del batch["visual_boxes"]
    with pytest.raises(TypeError, match="'visual_boxes'"):
        vl_bart.model()(**batch, decoder_input_ids=WRITTEN)
