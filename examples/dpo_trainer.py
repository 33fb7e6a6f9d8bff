"""TRL's DPOTrainer over an adapted model on DeepSpeed ZeRO-3, without a second model for the reference.

    deepspeed --num_accelerators 2 examples/dpo_trainer.py runs/quickstart/base runs/dpo

`make demo` makes that base; any causal language model of Hugging Face, a folder or a hub name, will do.
Needs the extra `trl`.
"""

import sys
from typing import Any

from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from sft_trainer import ADAPTER, settings
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dora_dist import adapters_off, build_model, save_adapter
from dora_dist.config import ModelConfig

PAIRS = [
    {"prompt": "The norm is", "chosen": " a function of the parameters.", "rejected": " a buffer."},
    {"prompt": "A rank reads", "chosen": " the bytes of its own shard.", "rejected": " all of the files."},
    {"prompt": "The base is", "chosen": " frozen.", "rejected": " trained, and saved with every checkpoint."},
    {"prompt": "A checkpoint has", "chosen": " no world size.", "rejected": " as many files as ranks."},
]


class BaseAsReference(DPOTrainer):
    """The reference is the model itself with its adapters off, computed in each step: one more forward, and ZeRO-3
    fetches no weights ahead, as no step has one forward alone.

    TRL's own ways are a second model, or numbers that it computes beforehand with a second engine around the same
    model; that engine's hooks stay, and ZeRO-3 fails in the first training step. `precompute_ref_log_probs=True` has
    it load no second model, and read the reference from the batch: `compute_loss` puts it there.
    """

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with adapters_off(model):
            chosen, rejected = self.compute_ref_log_probs(model, inputs)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def main(base: str, output: str, steps: int = 10, *, bf16: bool = True) -> list[float]:
    """Train on the pairs above and save the adapter into `output`; returns the logged losses. The first is log 2."""
    engine = settings(micro_batch_size=2, bf16=bf16)
    run = build_model(ModelConfig(path=base, dtype="bf16" if bf16 else "fp32"), ADAPTER, deepspeed=engine)
    arguments = DPOConfig(
        output_dir=f"{output}-trainer",
        deepspeed=engine,
        use_cpu=get_accelerator().device_name() == "cpu",
        bf16=bf16,
        per_device_train_batch_size=2,
        precompute_ref_log_probs=True,
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
    trainer = BaseAsReference(
        model=model, args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    trainer.train()
    save_adapter(run, output, overwrite=True)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    base, output = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(base, output)
