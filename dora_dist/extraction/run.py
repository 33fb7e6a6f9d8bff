"""An extraction from its beginning to its end: what is wanted, what is there already, what is new."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dora_dist.config import is_local
from dora_dist.data.pictures import PictureReader, missing_pictures
from dora_dist.extraction.items import Item, Items, find_items
from dora_dist.extraction.options import ExtractionOptions, Extractor, option
from dora_dist.extraction.pictures import PictureExtractor
from dora_dist.extraction.store import Arrays, FeatureStore
from dora_dist.extraction.videos import VideoExtractor
from dora_dist.models.vision_tower import VisionTower
from dora_dist.runtime import console, extras
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.hub import fetch
from dora_dist.weights.digest import sampled_digest
from dora_dist.weights.safetensors_io import TensorFolder

_STORED = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class Extracted:
    """What an extraction did."""

    new: int
    present: int
    """Were there already."""
    skipped: tuple[tuple[str, str], ...]
    """Names of what could not be read, each with the reason."""
    total: int
    """Wanted in the end, over all parts."""
    complete: bool
    """Whether the output holds everything, but for what was skipped."""


def extract_features(
    source: Path, tower: str, output: Path, options: ExtractionOptions, *, progress: bool = True
) -> Extracted:
    """Write the features of pictures or videos (`source`, see `find_items`) to an HDF5 file, or a folder of .npz.

    Pictures: a file with ID/features (rows * columns, d) and perhaps ID/boxes (rows * columns, 4) of each. Videos: a
    folder with ID.npz of each, which holds "features" (T, d).
    tower: a folder or hub name. What is in the output is passed over, so an extraction that was ended goes on; of
    several parts, the process that ends last makes the HDF5 file. Raises UserError for what cannot be read.
    """
    extras.need("PIL", purpose="extract-features:")
    items = find_items(source, options.image_folder)
    if items.kind == "video":
        extras.need("av", purpose=f"extract-features: reading {items.items[0].path}")
    folder = Path(tower) if is_local(tower) else fetch(tower, field="--tower")
    extractor = _extractor(items, folder, options)
    store = FeatureStore(output, _settings(items, folder, extractor, options), items.kind)
    own = items.part(*options.part)
    if options.bad_images == "error":
        _refuse_missing(own)
    extractor.check()
    missing = store.open(item.id for item in own.items)
    wanted = [item for item in own.items if item.id in missing]
    skipped = _write(extractor, wanted, store, options, bar=_bar(own, wanted, progress))
    complete = store.complete([item.id for item in items.items])
    there = len(own.items) - len(wanted)
    return Extracted(len(wanted) - len(skipped), there, tuple(skipped), len(items.items), complete)


def _extractor(items: Items, folder: Path, options: ExtractionOptions) -> Extractor:
    pad = options.image_aspect_ratio == "pad"
    tower = VisionTower.read(folder, dtype=options.dtype, side=options.image_size, pad=pad, named=option)
    on_gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    tower.model.to(on_gpu or torch.device("cpu"))
    most = options.max_image_pixels
    reader = PictureReader(items.folder, tower.processor, pad=pad, max_pixels=most, named=option)
    kinds: dict[str, Any] = {"image": PictureExtractor, "video": VideoExtractor}
    extractor: Extractor = kinds[items.kind](tower, reader, options)
    return extractor


def _settings(items: Items, folder: Path, extractor: Extractor, options: ExtractionOptions) -> dict[str, Any]:
    """What two extractions must have in common to share an output, as JSON."""
    return {
        "of": items.kind,
        "tower": sampled_digest(TensorFolder.open(folder)),  # not its name: folders are copied, and models replaced
        **extractor.settings(),
        "image_aspect_ratio": options.image_aspect_ratio,
        "dtype": options.dtype,
        "store": options.store,
    }


def _refuse_missing(own: Items) -> None:
    paths = [item.path for item in own.items]
    if missing := missing_pictures(own.folder, paths):
        first = next(path for path in paths if path in missing)
        raise UserError(
            f"{own.folder / first}: does not exist ({len(missing):,} files are missing in all); set "
            "--image-folder to where they are, or leave them out with --bad-images skip"
        )


def _bar(own: Items, wanted: list[Item], shown: bool) -> Any:
    there = len(own.items) - len(wanted)
    return console.progress(len(own.items), "features", own.kind, shown=shown, initial=there)


def _write(
    extractor: Extractor, wanted: list[Item], store: FeatureStore, options: ExtractionOptions, *, bar: Any
) -> list[tuple[str, str]]:
    """Write what comes out of each item; those that could not be read, with the reason."""
    skipped = []
    with bar:
        for item, outcome in extractor.outcomes(wanted):
            if not isinstance(outcome, UserError):
                store.parts.write(item.id, _stored(item, outcome, options))
            elif options.bad_images == "skip":
                store.parts.skip(item.id, str(outcome))
                skipped.append((item.id, str(outcome)))
            else:
                raise UserError(f"{outcome}; fix it, or leave such files out with --bad-images skip") from outcome
            bar.update()
    return skipped


def _stored(item: Item, features: Arrays, options: ExtractionOptions) -> dict[str, NDArray[np.floating]]:
    """Features in the number format of the files. Raises UserError if a number does not fit into it, or is NaN."""
    with np.errstate(over="ignore"):
        stored = {key: np.asarray(values, _STORED[options.store]) for key, values in features.items()}
    if not all(np.isfinite(values).all() for values in stored.values()):
        raise UserError(
            f"{item.path}: its features are NaN or infinite in {options.dtype}, kept in {options.store}; give --dtype "
            "fp32 and --store fp32, and look at the tower's weights if that is what you have"
        )
    return stored
