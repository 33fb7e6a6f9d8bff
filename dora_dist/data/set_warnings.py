"""What is odd about whole sets, which no single record shows."""

from __future__ import annotations

import os
from pathlib import Path

from dora_dist.config import DataConfig
from dora_dist.config.names import listed
from dora_dist.data.ragged import RaggedDataset, TokenizedData
from dora_dist.runtime.console import is_first, warn

MANY = 0.1
"""Share of samples that may be cut before it is worth a warning."""


def warn_of_the_whole(data: DataConfig, tokenized: TokenizedData, *, batch: int | None = None) -> None:
    """Warn of too few samples, of too many that are cut, and of validation on training samples.

    batch: training.global_batch_size; None: nothing is trained.
    """
    samples, stats = len(tokenized.train), tokenized.train_stats
    if batch is not None and samples < batch:
        warn(
            f"data.train has {samples:,} samples and training.global_batch_size = {batch}: every step sees all of them "
            f"and {batch - samples:,} places stay empty; lower it, or give more data"
        )
    for what, cut, of, limit in stats.cuts:
        if cut > MANY * of:
            warn(
                f"data.train: {cut:,} of {of:,} {what} ({cut / of:.0%}) are longer than {limit} and lose their end; "
                "raise it, or shorten the data"
            )
    if data.validation is not None and tokenized.validation is not None and is_first():  # only its warning is heard
        _warn_of_overlap(data, tokenized.train, tokenized.validation)


def _warn_of_overlap(data: DataConfig, train: RaggedDataset, validation: RaggedDataset) -> None:
    known = validation.in_both(train)
    if not known:
        return
    same = [name for name in listed(data.validation) if any(_one_file(name, other) for other in listed(data.train))]
    why = f" ({same[0]} is a file of data.train)" if same else ""
    warn(
        f"data.validation: {known:,} of its {len(validation):,} samples are in data.train, too{why}; what is "
        "measured on them says nothing about new data"
    )


def _one_file(name: str, other: str) -> bool:
    return Path(name).exists() and Path(other).exists() and os.path.samefile(name, other)
