"""A run's data in the form of its task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dora_dist.data.conversation_dataset import build_conversations
from dora_dist.data.dataset import TokenizedData, build_dataset
from dora_dist.data.doubts import warn_of_the_whole
from dora_dist.data.labelled import build_labelled
from dora_dist.data.spans import build_spans
from dora_dist.data.summaries import build_summaries

if TYPE_CHECKING:
    from dora_dist.config import RunConfig


def build_data(config: RunConfig, tokenizer: Any, *, progress: bool = True) -> TokenizedData:
    """Load and tokenize the data of a run for its task. Raises UserError for data that does not fit it.

    `tokenizer` is a fast tokenizer, or for texts with pictures a PictureProcessor. What is odd about the data, and can
    be trained on, is warned of.
    """
    data = _build(config, tokenizer, progress)
    warn_of_the_whole(config, data)
    return data


def _build(config: RunConfig, tokenizer: Any, progress: bool) -> TokenizedData:
    model, data, seed = config.model, config.data, config.training.seed
    if model.task == "sequence_classification":
        return build_labelled(data, tokenizer, num_labels=model.num_labels, seed=seed, progress=progress)
    if model.task == "question_answering":
        return build_spans(data, tokenizer, seed=seed, progress=progress)
    if model.task == "seq2seq_lm":
        return build_summaries(data, tokenizer, seed=seed, progress=progress)
    if model.task == "image_text_to_text":
        return build_conversations(data, tokenizer, seed=seed, progress=progress)
    return build_dataset(data, tokenizer, seed=seed, progress=progress)
