"""Texts that are longer than a model can read: refused by record, not cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dora_dist.models.folder import transformers_config
from dora_dist.runtime.errors import UserError


def positions_of(folder: Path) -> int | None:
    """How many tokens the model of a folder was made for; None where its config.json sets no bound, or stretches it.

    Raises UserError if the configuration cannot be read.
    """
    config = transformers_config(folder).get_text_config()
    # Which families have which of the two differs.
    rotary = config.rope_parameters if hasattr(config, "rope_parameters") else None
    stretched = (rotary or {}).get("rope_type", "default") not in ("default", "llama3")
    bounded = hasattr(config, "max_position_embeddings") and not stretched
    return config.max_position_embeddings if bounded else None


def check_lengths(places: Sequence[str], lengths: Sequence[int], positions: int | None, *, new_tokens: int = 0) -> None:
    """Raise UserError, naming the first record, if texts of `lengths` tokens and `new_tokens` more are too long."""
    if positions is None:
        return
    long = [i for i, length in enumerate(lengths) if length + new_tokens > positions]
    if not long:
        return
    more = f" and {new_tokens:,} more are to be generated (--max-new-tokens)" if new_tokens else ""
    lower = ", or lower --max-new-tokens" if new_tokens else ""
    raise UserError(
        f"{places[long[0]]}: it has {lengths[long[0]]:,} tokens{more}, and the model reads {positions:,} at most; "
        f"shorten it or take it out ({len(long):,} of {len(lengths):,} records are too long){lower}"
    )
