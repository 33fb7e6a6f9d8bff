"""RunConfig in the words of Hugging Face's Trainer."""

from typing import Any

from transformers import TrainingArguments

from dora_dist.config import RunConfig
from dora_dist.config.schema import BatchPlan
from dora_dist.training.rates import library_name

NEVER = 10**12
"""An interval of steps that no run reaches. The Trainer saves at the end, too, and this leaves that alone."""


def training_arguments(config: RunConfig, plan: BatchPlan, deepspeed: dict[str, Any]) -> TrainingArguments:
    """The Trainer's settings of a run whose batches are taken as `plan` says; the rest is in its configuration."""
    training, checkpoint = config.training, config.checkpoint
    warmup = training.warmup_steps if training.warmup_steps is not None else (training.warmup_ratio or 0)
    return TrainingArguments(
        output_dir=checkpoint.run_dir,
        deepspeed=deepspeed,
        use_cpu=_on_cpu(),
        bf16=config.model.dtype == "bf16",
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=library_name(training.schedule),
        lr_scheduler_kwargs=training.schedule_settings or None,
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        optim="adamw_torch",
        seed=training.seed,
        eval_strategy="steps" if training.eval_every else "no",
        eval_steps=training.eval_every,
        metric_for_best_model=training.metric if training.eval_every else None,
        greater_is_better=training.metric != "loss" if training.eval_every else None,
        save_strategy="steps",
        save_steps=checkpoint.save_every or NEVER,
        logging_steps=config.logging.every,
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run
        report_to=[],  # TensorBoard's callback is our own to place
        disable_tqdm=True,  # our own callback draws the bar
        average_tokens_across_devices=True,
        dataloader_num_workers=config.data.num_workers,
        remove_unused_columns=False,
        include_num_input_tokens_seen="no",
        ddp_timeout=int(config.engine.start_timeout_s),
    )


def _on_cpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() == "cpu")
