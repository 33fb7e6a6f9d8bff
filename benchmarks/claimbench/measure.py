"""Which questions a run, or a plain model, answers right, by answer likelihood: `measure.py MODEL QUESTIONS OUTPUT`."""

import json
import sys
from pathlib import Path

from dora_dist.data.records import load_records
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.tasks.evaluations.labels import score_task


def main(model: str, questions: Path, output: Path) -> None:
    """Write a string of "1" and "0", one for each question."""
    records = load_records([questions], "completion")
    net, tokenizer = load_for_inference(model)
    score = score_task(
        net, tokenizer, records, "", mode="likelihood", format="completion", batch_size=16, progress=False
    )
    right = (found == record["completion"] for found, record in zip(score.predictions, records, strict=True))
    output.write_text(json.dumps("".join("1" if each else "0" for each in right)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
