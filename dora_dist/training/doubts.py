"""Settings that do not fit a run's length or its model: refused where they must fail, else warned of once."""

from __future__ import annotations

from typing import Any

from torch import nn

from dora_dist.adapters.layer import adapted_layers
from dora_dist.config import CheckpointConfig, TrainingConfig
from dora_dist.data import RaggedDataset, TokenizedData
from dora_dist.runtime.console import note, warn
from dora_dist.runtime.errors import UserError
from dora_dist.training.rates import rated

_LARGE_RATE = 0.1  # AdamW moves every weight by about the rate in each step, and weights are of this size
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # tables of learned ones


def of_settings(training: TrainingConfig, checkpoint: CheckpointConfig, steps: int) -> None:
    """Warn of settings that a run of `steps` optimizer steps never reaches, and of learning rates that are too high."""
    run = f"the run has {steps:,} step{'' if steps == 1 else 's'}"
    if (warmup := training.warmup_steps or 0) >= steps:
        warn(
            f"training.warmup_steps = {warmup:,}: {run}, so the learning rate never reaches "
            f"training.learning_rate = {training.learning_rate:g}; lower it, or train for longer"
        )
    for name, rate in [("training.learning_rate", training.learning_rate), *_named(training.learning_rates)]:
        if rate > _LARGE_RATE:
            warn(f"{name} = {rate:g}: AdamW moves every trained weight by about that much in each step; lower it")
    if (every := training.eval_every) is not None and every > steps:
        warn(f"training.eval_every = {every:,}: {run}, so nothing is evaluated while it trains; lower it")
    if (every := checkpoint.save_every) is not None and every > steps:
        note(f"checkpoint.save_every = {every:,}: {run}, so the only checkpoint is the one at the end")


def of_model(model: Any, training: TrainingConfig, cutoff: int, data: TokenizedData) -> None:
    """Compare settings with an adapted model whose weights are not read yet.

    Samples have at most `cutoff` tokens (data.cutoff_len).

    Raises UserError for learning_rates of what is not trained, and for samples that the model cannot take.
    """
    for pattern in training.learning_rates:
        rated(model, pattern)
    for samples in (data.train, data.validation):
        if samples is not None:
            samples.check_model(model)
    _check_positions(model, cutoff, data.train)
    layers = adapted_layers(model)
    useful = {name: layer.method.largest_useful_r(layer.shape) for name, layer in layers.items()}
    large = [name for name, most in useful.items() if most is not None and layers[name].method.r > most]
    if large:
        first = layers[large[0]]
        warn(
            f"adapter.r: {first.method.r} components for {large[0]!r}, which is ({first.out_features}, "
            f"{first.in_features}), and {len(large) - 1:,} other layers as narrow: more than {useful[large[0]]} add "
            "nothing there; lower it"
        )


def _check_positions(model: Any, cutoff: int, samples: RaggedDataset) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # some models have none
    if positions is None or cutoff <= positions - 2:  # some tables begin with two places that are not positions
        return
    learned = [
        min(positions, table.num_embeddings) - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and name.endswith(_POSITIONS)
    ]
    most = min(learned, default=positions)
    if cutoff <= most:
        return
    remedy = f"lower it to {most}"
    if learned and (longest := samples.longest) > most:
        raise UserError(
            f"data.cutoff_len = {cutoff}: records have up to {longest} tokens, and the model learned positions for "
            f"{most} only; {remedy}"
        )
    warn(
        f"data.cutoff_len = {cutoff}: the model was trained on texts of at most {most} tokens (max_position_embeddings "
        f"in its config.json); longer ones are beyond what it knows; {remedy}"
    )


def _named(rates: dict[str, float]) -> list[tuple[str, float]]:
    return [(f'training.learning_rates, "{pattern}"', rate) for pattern, rate in rates.items()]
