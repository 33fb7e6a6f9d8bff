"""A run's data in the form of its task."""

from __future__ import annotations

from typing import Any

from dora_dist.config import RunConfig
from dora_dist.data.labelled import LabelledReader
from dora_dist.data.pictured import ConversationReader
from dora_dist.data.ragged import TokenizedData
from dora_dist.data.reader import Reader
from dora_dist.data.reading import read
from dora_dist.data.spans import SpanReader
from dora_dist.data.summaries import SummaryReader
from dora_dist.data.texts import TextReader
from dora_dist.data.whole import warn_of_the_whole


def build_data(config: RunConfig, tokenizer: Any, *, progress: bool = True) -> TokenizedData:
    """Load and tokenize the data of a run for its task. Raises UserError for data that does not fit it.

    `tokenizer` is a fast tokenizer, or for texts with pictures a PictureProcessor. What is odd about the data, and can
    be trained on, is warned of.
    """
    data = read(_reader(config, tokenizer), config.data, seed=config.training.seed, progress=progress)
    warn_of_the_whole(config.data, data, batch=config.training.global_batch_size)
    return data


def _reader(config: RunConfig, tokenizer: Any) -> Reader:
    task, data = config.model.task, config.data
    if task == "sequence_classification":
        return LabelledReader(data, tokenizer, config.model.num_labels)
    if task == "question_answering":
        return SpanReader(data, tokenizer)
    if task == "seq2seq_lm":
        return SummaryReader(data, tokenizer)
    return (ConversationReader if task == "image_text_to_text" else TextReader)(data, tokenizer)
