"""Samples to padded batches, and the samples that fill a batch up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dora_dist.data.columns import IGNORED
from dora_dist.data.sampler import FILLER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Sample = dict[str, Any]


class WithFiller(Dataset[Sample]):
    """A data set with one more index, FILLER: a sample without loss; also where the set has no sample at an index."""

    def __init__(self, dataset: Any, filler: Sample):
        self.dataset, self.filler = dataset, filler

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Sample:
        sample = {} if i == FILLER else self.dataset[i]
        return sample if "input_ids" in sample else {**self.filler, **sample}


def text_filler(pad_token_id: int) -> Sample:
    """A padding token without a label."""
    return {"input_ids": [pad_token_id], "labels": [IGNORED]}


def labelled_filler(pad_token_id: int, labels: int = 1) -> Sample:
    """A padding token whose label is IGNORED, or each of whose `labels` is, where there are more."""
    return {"input_ids": [pad_token_id], "token_type_ids": [0], "label": IGNORED if labels == 1 else [IGNORED] * labels}


class Collator:
    """Pads samples on the right to the longest of the batch."""

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        """pad_to_multiple_of: round the batch's length up (8 suits tensor cores)."""
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of or 1

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """input_ids, labels, attention_mask: (samples, length) int64. Padding has label -100 and mask 0."""
        return {
            "input_ids": self._padded((sample["input_ids"] for sample in samples), self.pad_token_id),
            "labels": self._padded((sample["labels"] for sample in samples), IGNORED),
            "attention_mask": self._mask(samples),
        }

    def _mask(self, samples: Sequence[Sample]) -> Tensor:
        return self._padded(([1] * len(sample["input_ids"]) for sample in samples), 0)

    def _padded(self, rows: Iterable[Sequence[int]], value: int) -> Tensor:
        # The dtype is said for a sample without tokens, whose tensor would be of floats.
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        joined = pad_sequence(tensors, batch_first=True, padding_value=value)
        return F.pad(joined, (0, -joined.shape[1] % self.multiple), value=value)


class PictureCollator(Collator):
    """Pads texts, and stacks their pictures in order of appearance.

    A batch without a picture gets a black one that no token refers to, so that every rank runs the same modules.
    """

    def __init__(self, pad_token_id: int, size: tuple[int, int], pad_to_multiple_of: int | None = None):
        """size: (height, width) of every picture."""
        super().__init__(pad_token_id, pad_to_multiple_of)
        self.size = size

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """As `Collator`, with pixel_values (pictures, 3, height, width) fp32, and the samples' "problems" if any."""
        batch = super().__call__(samples)
        pictures = [picture for sample in samples for picture in sample.get("pictures", ())]
        batch["pixel_values"] = torch.stack(pictures) if pictures else torch.zeros(1, 3, *self.size)
        if problems := [sample["problem"] for sample in samples if "problem" in sample]:
            batch["problems"] = problems
        return batch


class VisionCollator:
    """Batches of texts with visual features, padded on the right to the longest of the batch.

    A batch in which nothing has features gets a single masked place for each sample, so that every rank runs the same
    modules.
    """

    def __init__(self, texts: Callable[[list[Sample]], dict[str, Any]], width: int):
        """texts: collates input_ids and labels. width: of the features."""
        self.texts, self.width = texts, width

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What `texts` makes, and for v visual places: visual_features (samples, v, width) and visual_boxes
        (samples, v, 4) fp32; visual_images (which picture of the sample), visual_objects (which region of the picture)
        and visual_mask (1 where there is something) (samples, v) int64. scores (samples,) fp32 of the targets, and the
        samples' "problems" if any.
        """
        batch = dict(self.texts([{name: sample[name] for name in ("input_ids", "labels")} for sample in samples]))
        batch["scores"] = torch.tensor([sample.get("score", 0.0) for sample in samples], dtype=torch.float32)
        shown = [sample.get("visual", ()) for sample in samples]
        places = max(1, *(sum(len(visual.features) for visual in visuals) for visuals in shown))
        features, boxes = (torch.zeros(len(samples), places, width) for width in (self.width, 4))
        images, objects, mask = (torch.zeros(len(samples), places, dtype=torch.int64) for _ in range(3))
        for row, visuals in enumerate(shown):
            start = 0
            for image, visual in enumerate(visuals):
                here = slice(start, start := start + len(visual.features))
                features[row, here], boxes[row, here] = visual.features, visual.boxes
                images[row, here], objects[row, here] = image, torch.arange(len(visual.features))
                mask[row, here] = 1
        batch |= {"visual_features": features, "visual_boxes": boxes}
        batch |= {"visual_images": images, "visual_objects": objects, "visual_mask": mask}
        if problems := [sample["problem"] for sample in samples if "problem" in sample]:
            batch["problems"] = problems
        return batch


class LabelledCollator(Collator):
    """Pads labelled samples on the right to the longest of the batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rating: bool, pad_to_multiple_of: int = 1):
        """rating: labels are numbers (fp32) rather than classes (int64)."""
        super().__init__(tokenizer.pad_token_id, pad_to_multiple_of)
        self.segment_padding = tokenizer.pad_token_type_id
        self.segments = "token_type_ids" in tokenizer.model_input_names
        self.dtype = torch.float32 if rating else torch.int64

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """input_ids, attention_mask, and where the tokenizer has them token_type_ids: (samples, length) int64;
        labels (samples,) or (samples, k)."""
        batch = {
            "input_ids": self._padded((sample["input_ids"] for sample in samples), self.pad_token_id),
            "attention_mask": self._mask(samples),
            "labels": torch.tensor([sample["label"] for sample in samples], dtype=self.dtype),
        }
        if self.segments:
            batch["token_type_ids"] = self._padded(
                (sample["token_type_ids"] for sample in samples), self.segment_padding
            )
        return batch
