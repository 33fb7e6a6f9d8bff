"""TRL's SFTTrainer over an adapted model on DeepSpeed ZeRO-3.

    deepspeed --num_accelerators 2 examples/sft_trainer.py runs/quickstart/base runs/sft

`make demo` makes that base; any causal language model of Hugging Face, a folder or a hub name, will do.
Needs the extra `trl`.
"""

import sys
from typing import Any

from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from dora_dist import build_model, save_adapter
from dora_dist.config import AdapterConfig, ModelConfig

RECORDS = [
    {"prompt": "The norm of each row is", "completion": " a function of the parameters."},
    {"prompt": "A rank reads", "completion": " the bytes of its own shard."},
    {"prompt": "The base is frozen, and", "completion": " the adapter is trained."},
    {"prompt": "A checkpoint does not know", "completion": " the world size."},
]
ADAPTER = AdapterConfig(r=8, lora_alpha=16.0, target_modules=["q_proj", "v_proj", "down_proj"])


def settings(micro_batch_size: int, bf16: bool) -> dict[str, Any]:
    """A DeepSpeed JSON without "auto": the model is made for it before a Trainer could fill anything in."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,  # torch's AdamW; DeepSpeed knows its own alone
        "gradient_clipping": 1.0,
    }


def main(base: str, output: str, steps: int = 10, *, bf16: bool = True) -> list[float]:
    """Train on the records above and save the adapter into `output`; returns the logged losses."""
    engine = settings(micro_batch_size=2, bf16=bf16)
    run = build_model(ModelConfig(path=base, dtype="bf16" if bf16 else "fp32"), ADAPTER, deepspeed=engine)
    arguments = SFTConfig(
        output_dir=f"{output}-trainer",
        deepspeed=engine,
        use_cpu=get_accelerator().device_name() == "cpu",
        bf16=bf16,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",  # its checkpoints would hold the base; `save_adapter` writes what is trained
        report_to=[],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = run.model
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(RECORDS), processing_class=tokenizer
    )
    trainer.train()
    save_adapter(run, output, overwrite=True)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    base, output = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(base, output)
