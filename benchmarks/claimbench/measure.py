"""Which records a run, or a plain model, is right about: `measure.py MODEL RECORDS OUTPUT`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from stages import read_jsonl

from claimbench.tasks import CUTOFF
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.tasks.evaluations.labels import score_task

Record = dict[str, Any]
BATCH = 16


def main(model: str, file: Path, output: Path) -> None:
    """Write a string of "1" and "0", one for each record."""
    net, tokenizer = load_for_inference(model)
    records = read_jsonl(file)
    right = (_answered if "choices" in records[0] else _labelled)(net, tokenizer, records)
    output.write_text(json.dumps("".join("1" if each else "0" for each in right)), encoding="utf-8")


def _answered(net: Any, tokenizer: Any, records: list[Record]) -> Iterator[bool]:
    """Of questions: is the likeliest answer the right one?"""
    asked: dict[str, Any] = {"mode": "likelihood", "format": "completion", "batch_size": BATCH, "progress": False}
    found = score_task(net, tokenizer, records, "", **asked).predictions
    return (prediction == record["completion"] for prediction, record in zip(found, records, strict=True))


def _labelled(net: Any, tokenizer: Any, records: list[Record]) -> Iterator[bool]:
    """Of texts with labels: is the likeliest label the right one?"""
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        sentences = [record["sentence"] for record in batch]
        texts = tokenizer(sentences, padding=True, truncation=True, max_length=CUTOFF, return_tensors="pt")
        with torch.inference_mode():
            labels = net(**texts.to(net.device)).logits.argmax(-1).tolist()
        yield from (label == record["label"] for label, record in zip(labels, batch, strict=True))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
