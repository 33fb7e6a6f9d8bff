"""Small but real encoders of transformers, a trained WordPiece tokenizer, and labelled texts."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,  # a rank's own random numbers would make losses depend on the world size
    "attention_probs_dropout_prob": 0.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"bos_token_id": 2, "eos_token_id": 3},
    "xlm-roberta": {"bos_token_id": 2, "eos_token_id": 3},
    "electra": {"embedding_size": 12},
    "mpnet": {"bos_token_id": 2, "eos_token_id": 3},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": -1,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pooler_hidden_size": 20,
    },
}


def config(family: str, **changes: Any) -> Any:
    """A small configuration of one of FAMILIES."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})


def labelled(count: int, rating: bool = False) -> list[dict[str, Any]]:
    """Sentences whose words say what their label is, or their rating."""
    words = ["awful", "weak", "decent", "great"]
    return [
        {
            "sentence1": f"film {i % 7} was {words[i % 4]}",
            "sentence2": f"critic {i % 5} agrees" + " very much" * (i % 3),
            "label": i % 4 - 1.5 if rating else int(i % 4 > 1),
        }
        for i in range(count)
    ]


def write_labelled(path: Path, count: int, rating: bool = False) -> Path:
    """A JSON file of `labelled`."""
    path.write_text(json.dumps(labelled(count, rating)))
    return path


@cache  # its training breaks ties between pieces differently each time
def tokenizer() -> Any:
    """A WordPiece tokenizer trained on the records, with [CLS] and [SEP] around texts and pairs."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = BertWordPieceTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [f"{row['sentence1']} {row['sentence2']}" for row in labelled(30)]
    pieces.train_from_iterator(texts, vocab_size=120, special_tokens=special, show_progress=False)
    backend = type(pieces._tokenizer).from_str(pieces.to_str())
    from tokenizers.processors import BertProcessing

    backend.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    )


def plain_encoder(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A folder of the encoder alone, as pre-training leaves it, with the toy tokenizer."""
    from transformers import AutoModel

    torch.manual_seed(0)
    AutoModel.from_config(config(family, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def classifier(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A folder of the encoder with a classification head."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config(family, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokens() -> Tensor:
    """Token ids (3, 11), the same at every call."""
    return torch.randint(5, 100, (3, 11), generator=torch.Generator().manual_seed(1))


def questions(count: int) -> list[dict[str, Any]]:
    """Questions about films in SQuAD's format; every fourth has no answer."""
    words = ["awful", "weak", "decent", "great"]
    records = []
    for i in range(count):
        before = f"critic {i % 5} agrees" + " very much" * (i % 4) + f" film {i % 7} was "
        answer = words[i % 4] + " very" * (i % 2)
        answers = {"text": [answer], "answer_start": [len(before)]} if i % 4 != 3 else {"text": [], "answer_start": []}
        context = f"{before}{answer} film {(i + 1) % 7} agrees"
        records.append({"question": f"was film {i % 7}", "context": context, "answers": answers})
    return records
