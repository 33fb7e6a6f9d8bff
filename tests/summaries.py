"""A small BART of transformers, a byte-level tokenizer like its own, and documents with summaries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "d_model": 36,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 53,  # odd, so that shards cut rows and need padding
    "decoder_ffn_dim": 53,
    "max_position_embeddings": 64,
    "dropout": 0.0,  # a rank's own random numbers would make losses depend on the world size
    "init_std": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def records(count: int) -> list[dict[str, str]]:
    """Reports on films, each summarised by its second sentence."""
    words = ["awful", "weak", "decent", "great"]
    return [
        {
            "document": f"critic {i % 5} saw film {i % 7}." + " it was long." * (i % 4) + f" it was {words[i % 4]}.",
            "summary": f"film {i % 7} was {words[i % 4]}" + " indeed" * (i % 3),
        }
        for i in range(count)
    ]


def tokenizer(texts: Sequence[str], size: int = 320) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, with <s> and </s> around each, ids as BART's."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces.train_from_iterator(texts, vocab_size=size, special_tokens=special, show_progress=False)
    backend = type(pieces._tokenizer).from_str(pieces.to_str())
    backend.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )


def base_model(
    folder: Path,
    texts: Sequence[str] = (),
    kind: str = "BartForConditionalGeneration",
    end_bias: float = 0.0,
    **sizes: Any,
) -> Path:
    """A folder of a small BART with random weights, and a tokenizer of `texts` (default: of `records`).

    `end_bias` makes the end of a summary likelier.
    """
    import transformers

    text = tokenizer(texts or [value for record in records(30) for value in record.values()])
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BartConfig(**{**SIZES, "vocab_size": len(text), **sizes}))
    if hasattr(model, "final_logits_bias"):  # words of the summaries, so that a random model hits upon some
        model.final_logits_bias.normal_()
        model.final_logits_bias[:, text(" film was weak great")["input_ids"][1:-1]] += 4
        model.final_logits_bias[:, text.eos_token_id] += end_bias
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder
