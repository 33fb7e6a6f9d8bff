"""Small but real: LLaMA models of transformers, a trained tokenizer, records in the paper's format."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {  # odd ones, so that shards cut rows and need padding
    "hidden_size": 36,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def records(count: int) -> list[dict[str, str]]:
    """Yes/no questions in the paper's instruction format."""
    return [
        {
            "instruction": f"Please answer the following question with true or false, question: is {i} even?\n\n"
            "Answer format: true/false",
            "input": "",
            "output": f"the correct answer is {'false' if i % 2 else 'true'}",
            "answer": "false" if i % 2 else "true",
        }
        for i in range(count)
    ]


def write_records(path: Path, count: int) -> Path:
    """A JSON file of `records`."""
    path.write_text(json.dumps(records(count)))
    return path


def tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the records: 300 pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([json.dumps(records(50))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def base_model(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A LLaMA folder with random weights and the toy tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(text), **config})).to(dtype)
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def training_folder(folder: Path) -> Path:
    """`base`, a LLaMA, and `data.json`, 25 records: five held out leave a last, small batch to an epoch."""
    base_model(folder / "base")
    write_records(folder / "data.json", 25)
    return folder


def tokens(rows: int = 2, length: int = 17, vocabulary: int = 300) -> Tensor:
    """Token ids (rows, length), the same at every call."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in fp64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
