"""A new LLaVA folder: a vision tower's folder, a language model's folder, and a fresh projector between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.models.folder import ModelFolder, transformers_config
from dora_dist.models.llava.family import LANGUAGE, PROJECTOR, TOWER
from dora_dist.models.llava.placeholders import other_use, tokens_per_picture
from dora_dist.models.vision_tower import preprocessing, square_processor, tower_config
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import check_output, new_folder
from dora_dist.weights.names import Rename, rename_for
from dora_dist.weights.safetensors_io import TensorEntry, TensorFolder, TensorWriter

BLOCK_ELEMENTS = 4 << 20
EMBEDDING_MULTIPLE = 64  # new rows are added up to a multiple of it, as LLaVA-1.5 has them


@dataclass(frozen=True)
class Part:
    """One tensor to write: its published name, its shape there, and where its rows come from (None: fresh)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: TensorFolder | None = None
    entry: TensorEntry | None = None


def assemble_llava(
    vision: Path,
    language: Path,
    output: Path,
    *,
    image_token: str = "<image>",
    feature_layer: int = -2,
    image_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the folder `output`: weights, configuration, processor and tokenizer of a LLaVA whose projector is new.

    `vision` is the folder of a tower that transformers knows, or of a model with one (CLIP, SigLIP, DINOv2);
    `language` that of a causal language model. `image_token` stands for pictures: a token that the tokenizer has, or
    else a new one, for which the embeddings get rows (the mean of the others). Pictures are padded to squares of
    `image_size` pixels (None: as the tower's folder says). The projector is U(±1/√inputs), by `seed`.
    Tensors keep their dtypes and are copied in blocks: memory does not grow with the models. Returns the numbers of
    tensors, of tokens a picture, and the image token's id. Raises UserError for folders that do not fit together.
    """
    check_output(Path(output), {"vision tower": Path(vision), "language model": Path(language)})
    written, seen = ModelFolder.open(language, "--language"), ModelFolder.open(vision, "--vision")
    text_config, tower_config = _configs(seen.path, written.path)
    _check_geometry(tower_config, feature_layer, image_size)
    tokenizer, token_id = _tokenizer(Path(language), image_token)
    config = _llava_config(tower_config, text_config, token_id, feature_layer=feature_layer, tokens=len(tokenizer))
    processor = _processor(Path(vision), config, tokenizer, image_token=image_token, image_size=image_size)
    with new_folder(output, overwrite) as folder:
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)  # where older versions and other programs look
        generation = Path(language) / "generation_config.json"
        if generation.is_file():
            (folder / generation.name).write_bytes(generation.read_bytes())
        parts = _parts(folder, config, tower=seen.tensors, text=written.tensors)
        _write(folder, parts, seed)
    return {"tensors": sum(map(len, parts)), "tokens_per_picture": config.image_seq_length, "image_token_id": token_id}


def _configs(vision: Path, language: Path) -> tuple[Any, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text, tower = transformers_config(language), tower_config(vision, "--vision")
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--language {language}: {text.model_type!r} is not a causal language model")
    if not hasattr(tower, "patch_size"):
        raise UserError(f"--vision {vision}: {tower.model_type!r} is not a vision tower that LLaVA takes")
    if hasattr(tower, "vision_use_head"):
        tower.vision_use_head = False  # SigLIP pools into one vector for contrastive training only
    return text, tower


def _check_geometry(tower: Any, feature_layer: int, image_size: int | None) -> None:
    layers, patch = tower.num_hidden_layers, tower.patch_size
    if not -layers - 1 <= feature_layer <= layers:
        raise UserError(
            f"--feature-layer {feature_layer}: the tower has {layers} layers; give -{layers + 1} to {layers}, where "
            "0 are the embeddings and -1 is the last layer"
        )
    if image_size is not None and image_size != tower.image_size and image_size % patch:
        near = max(1, image_size // patch) * patch
        raise UserError(
            f"--image-size {image_size}: the tower cuts pictures into patches of {patch} pixels, and the rest would be "
            f"lost; give a multiple such as {near}, or {tower.image_size}, for which it was trained"
        )


def _tokenizer(language: Path, image_token: str) -> tuple[Any, int]:
    from dora_dist.data.conversations import VICUNA_TEMPLATE
    from dora_dist.models.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(language)
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    ids = tokenizer.encode(image_token, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"--image-token {image_token!r}: is not one token of {language}; give a special token, or a new"
        )
    if other := other_use(tokenizer, ids[0]):
        raise UserError(f"--image-token {image_token!r}: is the {other} of {language}; give one that has no other use")
    if not tokenizer.chat_template:
        tokenizer.chat_template = VICUNA_TEMPLATE
    return tokenizer, ids[0]


def _llava_config(tower: Any, text: Any, token_id: int, *, feature_layer: int, tokens: int) -> Any:
    """Features are the patches of the tower's layer `feature_layer`, without the class token where there is one."""
    from transformers import LlavaConfig

    if tokens > text.vocab_size:
        text.vocab_size = -(-tokens // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=token_id,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = text.dtype
    return config


def _processor(vision: Path, config: Any, tokenizer: Any, *, image_token: str, image_size: int | None) -> Any:
    """The processor of `config`, which is completed by what the processor shows of it."""
    from transformers import LlavaProcessor

    tower = config.vision_config
    settings = preprocessing(vision, tower.model_type, "--vision")
    side = image_size or settings.pop("side", None) or tower.image_size
    patches = (side // tower.patch_size) ** 2
    remedy = f"set --image-size {tower.image_size}"
    extra = tokens_per_picture(config, side, side, field=f"--vision {vision}", remedy=remedy) - patches
    if extra:
        config.vision_feature_select_strategy = "default"  # it drops the first
    config.image_seq_length = patches + max(extra - 1, 0)
    return LlavaProcessor(
        square_processor(settings, side, pad=True),
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=image_token,
        num_additional_image_tokens=extra,
    )


def _parts(folder: Path, config: Any, *, tower: TensorFolder, text: TensorFolder) -> list[list[Part]]:
    """What to write: one file for each file that is read, and one for the projector."""
    from dora_dist.models.build import skeleton
    from dora_dist.models.heads import IMAGE_TEXT_TO_TEXT

    model = skeleton(folder, IMAGE_TEXT_TO_TEXT)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rename = rename_for(model)
    files: dict[Path, list[Part]] = {}
    for source, top, own in ((tower, TOWER, config.vision_config.model_type), (text, LANGUAGE, "")):
        for entry in sorted(source.entries.values(), key=lambda entry: (entry.path, entry.offset)):
            name = _published(entry.name, top, own, rename=rename, wanted=wanted)
            if name is not None:
                shape = wanted.pop(rename(name))
                _check_shape(source, entry, shape)
                files.setdefault(entry.path, []).append(Part(name, shape, entry.dtype, source, entry))
    dtype = next(part.dtype for part in files[next(reversed(files))])
    fresh = [name for name in wanted if f"{PROJECTOR}." in name]
    if absent := sorted(set(wanted) - set(fresh)):
        where = tower if f"{TOWER}." in absent[0] else text
        raise UserError(
            f"{where.path}: has no weights for {absent[0]!r}; is it the model that its config.json describes?"
        )
    projector = [Part(name.removeprefix("model."), wanted[name], dtype) for name in fresh]
    return [*files.values(), projector]


def _published(name: str, top: str, own: str, *, rename: Rename, wanted: dict[str, Any]) -> str | None:
    """A tensor's name in a LLaVA folder, None for what LLaVA does not need (CLIP's text tower, a classifier).

    `own` is what a model with a tower calls it ("dinov2.encoder..."); it is left out.
    """
    for inner in (name, name.removeprefix(f"{own}.")):
        if rename(f"{top}.{inner}") in wanted:
            return f"{top}.{inner}"
    return None


def _check_shape(source: TensorFolder, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    grown = len(shape) == 2 and entry.shape[1:] == shape[1:] and entry.shape[0] < shape[0]
    embeds = "embed_tokens" in entry.name or "lm_head" in entry.name
    if entry.shape != shape and not (grown and embeds):
        raise UserError(f"{source.path}: tensor {entry.name!r} is {entry.shape}, its config.json says {shape}")


def _write(folder: Path, files: list[list[Part]], seed: int) -> None:
    weight_map = {}
    for number, parts in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        layout = [(part.name, part.dtype, part.shape) for part in parts]
        with TensorWriter(folder / name, layout, {"format": "pt"}) as writer:
            for part in parts:
                weight_map[part.name] = name
                for block in _blocks(part, seed):
                    writer.write(part.name, block)
    total = sum(part.dtype.itemsize * torch.Size(part.shape).numel() for parts in files for part in parts)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _blocks(part: Part, seed: int) -> Iterator[Tensor]:
    """A tensor's values in order, a bounded number at a time; flat."""
    from dora_dist.weights.loading import initial_values

    if part.source is None or part.entry is None:
        values, shape = torch.zeros(torch.Size(part.shape).numel()), torch.Size(part.shape)
        if len(shape) == 2:
            initial_values(part.name, shape, seed, shape[1] ** -0.5)(0, shape.numel(), values)
        yield values.to(part.dtype)
        return
    rows = part.entry.shape[0] if part.entry.shape else 1
    width = part.entry.numel // rows if rows else 0
    total = torch.zeros(width, dtype=torch.float64)
    grown = part.shape != part.entry.shape
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, rows, step):
        block = part.source.read_flat(part.entry.name, start * width, min(start + step, rows) * width)
        if grown:
            total += block.view(-1, width).double().sum(0)
        yield block
    if grown:
        yield (total / rows).to(part.dtype).repeat(part.shape[0] - rows)
