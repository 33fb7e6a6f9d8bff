"""Whether a tokenizer and a model's embedding go together: each token's id is the row that the model reads."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.runtime.console import note, warn
from dora_dist.runtime.errors import UserError

_USUAL_SHARE = 0.9
"""Embeddings are often rounded up to a multiple of 64 or 128; more unused rows than that are another tokenizer's."""


def check_vocabulary(tokenizer: Any, rows: int, base: Path | str, *, ids: Iterable[Tensor] = ()) -> None:
    """Compare a tokenizer with the embedding of `base`, which has `rows` rows.

    Raises UserError if a token of `ids` (int tensors), of padding or of the end of a sequence has no row there; warns
    of a tokenizer that has more tokens than there are rows, or far fewer.
    """
    count = max(tokenizer.get_vocab().values()) + 1
    largest = [int(part.max()) for part in ids if part.numel()]
    used = [n for n in (*largest, tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None]
    if (last := max(used, default=0)) >= rows:
        raise _no_row(tokenizer, last, rows, base=base)
    if count > rows:
        warn(
            f"the tokenizer has {count:,} tokens and the embedding of {base} {rows:,} rows: texts with the tokens from "
            f"{rows} on ({tokenizer.convert_ids_to_tokens(rows)!r}) are refused; is it the model's own tokenizer?"
        )
    elif count < _USUAL_SHARE * rows:
        warn(
            f"the tokenizer has {count:,} tokens and the embedding of {base} {rows:,} rows; is it the model's own "
            "tokenizer?"
        )


def refuse_tokens_without_rows(model: Any, tokenizer: Any, base: Path | str) -> None:
    """Have a model, in one process, raise UserError for a token that its embedding has no row for.

    Without a tokenizer that has such tokens nothing is done, so that no forward waits for the device.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    check_vocabulary(tokenizer, rows, base)
    if max(tokenizer.get_vocab().values()) < rows:
        return

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and (last := int(torch.max(inputs[0]))) >= rows:
            raise _no_row(tokenizer, last, rows, base=base)

    embedding.register_forward_pre_hook(check)


def agree_on_padding(model: Any, tokenizer: Any) -> None:
    """Tell a model that labels texts by their last token which token pads them: it looks for the last other one.

    Such models are decoders (LLaMA), whose folders often name no padding token; `load_tokenizer` chose one then.
    """
    from transformers.modeling_layers import GenericForSequenceClassification

    config = model.config.get_text_config()
    before = config.pad_token_id
    if before == tokenizer.pad_token_id or not (before is None or isinstance(model, GenericForSequenceClassification)):
        return
    config.pad_token_id = tokenizer.pad_token_id
    named = "names no padding token" if before is None else f"has pad_token_id = {before}"
    note(
        f"the base's config.json {named}: texts are padded with the tokenizer's {tokenizer.pad_token!r} (id "
        f"{tokenizer.pad_token_id}), as the adapter's and the merged model's configuration says"
    )


def _no_row(tokenizer: Any, token_id: int, rows: int, *, base: Path | str) -> UserError:
    return UserError(
        f"the tokenizer has the token {tokenizer.convert_ids_to_tokens(token_id)!r} of id {token_id}, and the "
        f"embedding of {base} has {rows} rows; give the model's own tokenizer, or a base whose embedding was resized "
        "for the new tokens (resize_token_embeddings and save_pretrained of transformers)"
    )
