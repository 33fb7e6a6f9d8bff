"""Tokenizers: Hugging Face folders, hub names, and LLaMA's own sentencepiece `tokenizer.model`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.models.folder import own_code_needed, reason
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCEPIECE_FILE = "tokenizer.model"
PROCESSOR_FILES = ("*processor_config.json", "chat_template.*")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # ModelProto.SentencePiece.Type
BPE_MODEL = 2  # TrainerSpec.ModelType


def load_tokenizer(
    path_or_name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    generative: bool = True,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer that has a padding token and, where it is for a `generative` model, an end-of-sequence token.

    Args:
        path_or_name: a Hugging Face folder, a hub name, or a sentencepiece file such as LLaMA's
            `tokenizer.model`. A folder with `tokenizer.model` and no `tokenizer.json` is read as that file.

    A missing padding token becomes the unknown token (LLaMA's recipe) or else the end-of-sequence token;
    padding is never a label, so neither is unlearned by it. Raises UserError when there is no such tokenizer
    or it cannot serve: character offsets (fast tokenizers) and an end-of-sequence token are needed.
    """
    name = str(path_or_name)
    try:
        if Path(name).is_file():
            tokenizer = from_sentencepiece(Path(name))
        else:
            tokenizer = _from_repository(name, revision, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # broken files make the libraries raise anything
        _blame(Path(name))
        if "trust_remote_code" in str(error):
            raise UserError(f"{name}/tokenizer_config.json: {own_code_needed(name)}") from error
        found = Path(name).exists()
        what = "holds no tokenizer that loads" if found else "is neither a folder here nor a hub name"
        raise UserError(
            f"tokenizer {name} {what}; give a folder with tokenizer.json, a tokenizer.model file or a hub "
            f"name ({reason(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {name} gives no character offsets; a fast one (tokenizer.json) is needed")
    if generative and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name} has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or tokenizer.sep_token
    return tokenizer


def _blame(folder: Path) -> None:
    """Raise UserError for the file of a tokenizer's folder that is broken, if one is."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        file = folder / name
        if file.is_file():
            read_json_object(file, "take the file of the model's own repository")
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"{folder / 'tokenizer.json'}: is not a tokenizer ({reason(error)}); take the file of the model's own "
                "repository"
            ) from error


def files_of(tokenizer: PreTrainedTokenizerFast, processor: Path | None = None) -> dict[str, bytes]:
    """The files that a tokenizer is saved as, by name; and those of the folder `processor` that go with it where it
    is part of one for pictures.
    """
    tokenizer.backend_tokenizer.no_truncation()  # else it says how texts were last cut here
    tokenizer.backend_tokenizer.no_padding()
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"the tokenizer cannot be written: {reason(error)}; TMPDIR names another folder") from error
        found = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    if processor is not None:
        own = [path for pattern in PROCESSOR_FILES for path in sorted(processor.glob(pattern))]
        found = {path.name: path.read_bytes() for path in own} | found
    return found


def from_sentencepiece(file: Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer that splits text exactly as sentencepiece does with `file`, with bos in front.

    Merges are ranked by piece SCORE. LLaMA gives its runs of spaces the lowest score although their ids are
    low, so ranking by id, as transformers 5 does for a bare `tokenizer.model`, splits every indented prompt
    in another way than the pre-trained model has seen. Raises UserError unless `file` is a sentencepiece BPE
    model without text normalisation, as LLaMA 1 and 2, CodeLlama and Mistral have.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    proto = _read_sentencepiece(file)
    pieces, trainer = proto.pieces, proto.trainer_spec
    unk, bos, eos = (pieces[i].piece for i in (trainer.unk_id, trainer.bos_id, trainer.eos_id))
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    model = BPE(vocab, _merges(pieces), unk_token=unk, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    backend = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if proto.normalizer_spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([unk, *(p.piece for p in pieces if p.type == CONTROL)])
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == USER_DEFINED])
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, trainer.bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _read_sentencepiece(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as generated

    schema: Any = generated  # its classes are made at import, out of a type checker's sight
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        proto.Clear()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    rewrites = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    usable = proto.pieces and trainer.model_type == BPE_MODEL and min(trainer.bos_id, trainer.eos_id) >= 0
    if rewrites or not usable:
        raise UserError(
            f"{file} is not a sentencepiece model of LLaMA's kind (BPE, no text normalisation, bos and eos); "
            "LLaMA 3's file of that name is a tiktoken table: give the Hugging Face folder that has "
            "tokenizer.json instead"
        )
    return proto


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, in the order in which sentencepiece prefers them.

    Equal scores (the runs of spaces) go to the leftmost pair there; longest left part first is the same here.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    pairs = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1])))
    return [(left, right) for _, left, right in pairs]


def _from_repository(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """From a folder or a hub name: by transformers, unless only the sentencepiece file says how to split."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file, has_file

    def find(file: str) -> Path | None:
        found = cached_file(name, file, revision=revision) if has_file(name, file, revision=revision) else None
        return Path(found) if found else None

    pieces = None if find("tokenizer.json") else find(SENTENCEPIECE_FILE)
    if pieces is None:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        return tokenizer
    template, settings = find("chat_template.jinja"), find("tokenizer_config.json")
    if template is not None:
        return from_sentencepiece(pieces, template.read_text(encoding="utf-8"))
    config = json.loads(settings.read_text(encoding="utf-8")) if settings is not None else {}
    return from_sentencepiece(pieces, config.get("chat_template"))
