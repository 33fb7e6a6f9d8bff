"""From files of records to batches of token ids: formats, loading, tokenising, ordering, padding."""

from dora_dist.data.collate import (
    Collator,
    LabelledCollator,
    PictureCollator,
    VisionCollator,
    WithFiller,
    labelled_filler,
    text_filler,
)
from dora_dist.data.columns import IGNORED
from dora_dist.data.formats import FORMATS
from dora_dist.data.labelled import LabelledReader
from dora_dist.data.packing import InRows, Packing, RowCollator
from dora_dist.data.pictured import ConversationReader
from dora_dist.data.ragged import RaggedDataset, TokenizedData
from dora_dist.data.reader import Reader
from dora_dist.data.reading import read, validation_records
from dora_dist.data.records import load_records
from dora_dist.data.sampler import FILLER, EpochBatches, EpochDataLoader
from dora_dist.data.set_warnings import warn_of_the_whole
from dora_dist.data.spans import SpanReader
from dora_dist.data.summaries import SummaryReader
from dora_dist.data.texts import TextReader
from dora_dist.data.vision import VisionReader

__all__ = [
    "FILLER",
    "FORMATS",
    "IGNORED",
    "Collator",
    "ConversationReader",
    "EpochBatches",
    "EpochDataLoader",
    "InRows",
    "LabelledCollator",
    "LabelledReader",
    "Packing",
    "PictureCollator",
    "RaggedDataset",
    "Reader",
    "RowCollator",
    "SpanReader",
    "SummaryReader",
    "TextReader",
    "TokenizedData",
    "VisionCollator",
    "VisionReader",
    "WithFiller",
    "labelled_filler",
    "load_records",
    "read",
    "text_filler",
    "validation_records",
    "warn_of_the_whole",
]
