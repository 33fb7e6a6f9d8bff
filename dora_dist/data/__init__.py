"""From files of records to batches of token ids: formats, loading, tokenising, ordering, padding."""

from dora_dist.data.build import build_data
from dora_dist.data.collate import Collator, WithFiller
from dora_dist.data.columns import HasColumns, fingerprint
from dora_dist.data.conversation_dataset import ConversationDataset, build_conversations
from dora_dist.data.dataset import IGNORED, TokenizedData, TokenizedDataset, build_dataset
from dora_dist.data.formats import FORMATS
from dora_dist.data.labelled import LabelledCollator, LabelledDataset, WithLabelledFiller, build_labelled
from dora_dist.data.records import load_records
from dora_dist.data.sampler import FILLER, EpochBatches, EpochDataLoader
from dora_dist.data.spans import SpanDataset, build_spans
from dora_dist.data.summaries import SummaryDataset, build_summaries

__all__ = [
    "FILLER",
    "FORMATS",
    "IGNORED",
    "Collator",
    "ConversationDataset",
    "EpochBatches",
    "EpochDataLoader",
    "HasColumns",
    "LabelledCollator",
    "LabelledDataset",
    "SpanDataset",
    "SummaryDataset",
    "TokenizedData",
    "TokenizedDataset",
    "WithFiller",
    "WithLabelledFiller",
    "build_conversations",
    "build_data",
    "build_dataset",
    "build_labelled",
    "build_spans",
    "build_summaries",
    "fingerprint",
    "load_records",
]
