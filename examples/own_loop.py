"""A training loop of your own over an adapted model on DeepSpeed ZeRO-3.

    deepspeed --num_accelerators 2 examples/own_loop.py runs/quickstart/base runs/own

`make demo` makes that base; any causal language model of Hugging Face, a folder or a hub name, will do.
"""

import sys
from typing import Any

import deepspeed
import torch
from transformers import AutoTokenizer

from dora_dist import build_model, save_adapter
from dora_dist.config import AdapterConfig

TEXTS = [
    "The norm of each row is a function of the parameters.",
    "A rank reads the bytes of its own shard.",
    "The base is frozen, and the adapter is trained.",
    "A checkpoint does not know the world size.",
]
SETTINGS: dict[str, Any] = {
    "train_batch_size": 4,  # a multiple of the number of ranks
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,  # torch's AdamW; DeepSpeed knows its own alone
}


def main(base: str, output: str, steps: int = 10) -> list[float]:
    """Train on the texts above, the same batch in every step, and save the adapter; returns this rank's losses."""
    run = build_model(
        base, AdapterConfig(r=8, lora_alpha=16.0, target_modules=["q_proj", "v_proj"]), deepspeed=SETTINGS
    )
    trained = [p for p in run.model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=run.model, optimizer=torch.optim.AdamW(trained, lr=5e-3), config=SETTINGS)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batch = encode(TEXTS[rank::world_size], base).to(engine.device)
    losses = []
    for step in range(steps):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()  # the next forward refreshes the norms; nothing to call
        losses.append(loss.item())
        if rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}")
    save_adapter(run, output, overwrite=True)  # on every rank; rank 0 writes
    return losses


def encode(texts: list[str], base: str) -> Any:
    """Token ids, mask and labels, (rows, length), as the model's forward takes them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


if __name__ == "__main__":
    base, output = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(base, output)
