"""What turns conversations into a LLaVA's input, from the model's folder."""

from pathlib import Path
from typing import Any

from dora_dist.config import DataConfig
from dora_dist.data.pictures import PictureProcessor, PictureReader, PictureTokens
from dora_dist.models.folder import reason
from dora_dist.models.llava.placeholders import other_use, tokens_per_picture
from dora_dist.models.tokenizer import load_tokenizer
from dora_dist.runtime import extras
from dora_dist.runtime.errors import UserError


def load_processor(base: Path, config: Any, data: DataConfig, *, tokenizer: str | None) -> PictureProcessor:
    """The processor of a LLaVA's folder `base` with `config`; `tokenizer` names another than the folder's.

    The number of tokens of a picture is what the model's own tower makes of it, whatever the processor's settings
    say. Raises UserError if the parts do not fit together.
    """
    extras.need("PIL", purpose=f"model.path: reading pictures for {base}")
    from transformers import AutoImageProcessor

    text: Any = load_tokenizer(tokenizer or str(base))
    try:
        # Pillow's arithmetic, with which these models were trained, whatever else is installed.
        images = AutoImageProcessor.from_pretrained(base, backend="pil")
    except Exception as error:  # its classes check their settings in their own ways
        raise UserError(
            f"model.path: {base} has no image processor that loads (preprocessor_config.json): {reason(error)}"
        ) from error
    pad = data.image_aspect_ratio == "pad"
    reader = PictureReader(Path(data.image_folder or ""), images, pad=pad, max_pixels=data.max_image_pixels)
    token = text.convert_ids_to_tokens(config.image_token_id)
    if token is None or text.encode(token, add_special_tokens=False) != [config.image_token_id]:
        raise UserError(
            f"model.tokenizer: it has no special token of id {config.image_token_id}, which stands for pictures in "
            f"{base}; give the model's own tokenizer"
        )
    if other := other_use(text, config.image_token_id):
        raise UserError(
            f"model.tokenizer: its {other} is {token!r}, which stands for pictures in {base}; give it a {other} of its "
            "own, or assemble the model with another --image-token"
        )
    size = reader.size()
    stands = PictureTokens(token, config.image_token_id, tokens_per_picture(config, *size))
    return PictureProcessor(text, reader, size, stands)
