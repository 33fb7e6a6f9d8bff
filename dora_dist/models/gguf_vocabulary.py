"""A tokenizer in GGUF's fields, where llama.cpp has code that splits texts in the same way; any other is refused.

llama.cpp knows two kinds that LLaMA-like models have. BPE on bytes: merges, and the name of a rule that cuts texts into
words first, which has to be one that it has code for. And sentencepiece's: scores in place of merges, no words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
_BYTES, _GPT2_WORDS = ("ByteLevel", False, False), ("ByteLevel", False, True)

_WORD_RULES = {
    ((_GPT2_WORDS,), False): "gpt-2",
    ((("Digits", True), _GPT2_WORDS), False): "smollm",
    ((("Split", _LLAMA3, "Isolated", False), _BYTES), True): "llama-bpe",
    ((("Split", _QWEN2, "Isolated", False), _BYTES), False): "qwen2",
}
"""(steps of the pre-tokenizer, ignore_merges) -> llama.cpp's name of the rule (tokenizer.ggml.pre)."""

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType
_WITHOUT_MERGE = -1e9
_REMEDY = "merge (dora-dist consolidate), and convert the folder with llama.cpp's own program if that knows it"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer. `texts` and `kinds` have an entry for each row of the embedding."""

    kind: str
    word_rule: str
    texts: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool | None
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Add the fields to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.word_rule)
        writer.add_token_list(self.texts)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: Any, rows: int, source: str) -> Vocabulary:
    """The fields of a fast `tokenizer` for an embedding of `rows` rows; `source` is where it is from, for messages.

    Raises UserError where llama.cpp would split texts in another way, and for tokens beyond the embedding.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if model["type"] != "BPE" or not plain:
        raise _unknown(source, f"is of kind {model['type']}" if plain else "is a BPE with word parts or dropout")
    for token in backend["added_tokens"]:
        if odd := next((key for key in ("single_word", "lstrip", "rstrip") if token[key]), None):
            raise _unknown(source, f"has a token {token['content']!r} with {odd}")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    texts, kinds = _tokens(backend, rows, source)
    merges: list[str] = []
    scores: list[float] = []
    space_prefix = None
    if model.get("byte_fallback"):
        kind, rule, space_prefix = "llama", "default", _space_prefix(backend, source)
        kinds = [_kind_of_piece(text, kind, model) for text, kind in zip(texts, kinds, strict=True)]
        ranks = _scores(pairs, [text for text, kind in zip(texts, kinds, strict=True) if kind == _NORMAL], source)
        scores = [ranks.get(text, _WITHOUT_MERGE if len(text) > 1 else 0.0) for text in texts]
        texts = [
            text.replace(_SPACE, " ") if kind == _USER_DEFINED else text
            for text, kind in zip(texts, kinds, strict=True)
        ]
    else:
        kind, rule, merges = "gpt2", _word_rule(backend, source), [" ".join(pair) for pair in pairs]
    ids = tokenizer("a").input_ids
    template = tokenizer.chat_template
    return Vocabulary(
        kind=kind,
        word_rule=rule,
        texts=texts,
        kinds=kinds,
        merges=merges,
        scores=scores,
        special=_special(tokenizer),
        add_bos=tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        add_eos=tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
        space_prefix=space_prefix,
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _unknown(source: str, what: str) -> UserError:
    return UserError(f"{source}: the tokenizer {what}, which has no counterpart in GGUF that is known here; {_REMEDY}")


def _tokens(backend: Mapping[str, Any], rows: int, source: str) -> tuple[list[str], list[int]]:
    """Text and kind of each id; rows of the embedding that no token has are unused."""
    added = {token["id"]: token for token in backend["added_tokens"]}
    texts = {number: text for text, number in backend["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if (last := max(texts)) >= rows:
        raise UserError(
            f"{source}: the tokenizer's token {texts[last]!r} has id {last}, and the embedding has {rows} rows; "
            "give the model the tokenizer that it was trained with"
        )
    kinds = [_UNUSED] * rows
    for number in texts:
        kinds[number] = _NORMAL
    for number, token in added.items():
        kinds[number] = _CONTROL if token["special"] else _USER_DEFINED
    return [texts.get(number, f"[PAD{number}]") for number in range(rows)], kinds


def _special(tokenizer: Any) -> dict[str, int]:
    names = ("bos", "eos", "unk", "sep", "pad", "mask")
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    return {name: number for name, number in found.items() if number is not None}


# --- BPE on bytes -----------------------------------------------------------------------------------------------------


def _word_rule(backend: Mapping[str, Any], source: str) -> str:
    whole = backend["pre_tokenizer"] or {"type": "none"}
    steps = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    rule = _WORD_RULES.get((tuple(map(_step, steps)), bool(backend["model"].get("ignore_merges"))))
    normalizer = backend["normalizer"]
    if rule is None:
        known = ", ".join(_WORD_RULES.values())
        what = " + ".join(" ".join(map(str, _step(step))) for step in steps)
        raise _unknown(source, f"cuts words by {what} (known are those of {known})")
    if normalizer is not None and not (normalizer["type"] == "NFC" and rule == "qwen2"):
        raise _unknown(source, f"changes texts by {normalizer['type']}")
    return rule


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a step of a pre-tokenizer does, without what only concerns offsets."""
    match step["type"]:
        case "ByteLevel":
            return "ByteLevel", step["add_prefix_space"], step["use_regex"]
        case "Digits":
            return "Digits", step["individual_digits"]
        case "Split":
            return "Split", step["pattern"].get("Regex"), step["behavior"], step["invert"]
    return (step["type"],)


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def _space_prefix(backend: Mapping[str, Any], source: str) -> bool:
    """Whether a space is put in front of a text. Raises UserError for a tokenizer that does more than that to it."""
    words, normalizer = backend["pre_tokenizer"], backend["normalizer"]
    if words is not None and normalizer is None:
        if words["type"] == "Metaspace" and words["replacement"] == _SPACE and not words.get("split", True):
            if words["prepend_scheme"] == "never":
                return False
            note(
                f"{source}: llama.cpp puts a space in front of each text and after special tokens; what was trained "
                "with does not where a text has one already, nor after special tokens"
            )
            return True
    elif words is None and normalizer is not None:
        if changed := next((token["content"] for token in backend["added_tokens"] if token["normalized"]), None):
            raise _unknown(source, f"finds its token {changed!r} after it has put spaces into texts (normalized)")
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        prefix = {"type": "Prepend", "prepend": _SPACE}
        if steps in ([spaces], [prefix, spaces]):
            return len(steps) == 2
    told = " and ".join(part["type"] for part in (normalizer, words) if part is not None) or "nothing"
    raise _unknown(source, f"has pieces as sentencepiece has them, prepared by {told}")


def _kind_of_piece(text: str, kind: int, model: Mapping[str, Any]) -> int:
    if text == model.get("unk_token") or (kind == _CONTROL and text == "<unk>"):
        return _UNKNOWN
    return _BYTE if kind == _NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", text) else kind


def _scores(merges: Sequence[Sequence[str]], pieces: Sequence[str], source: str) -> dict[str, float]:
    """Scores of pieces that prefer the same merges.

    sentencepiece joins any two whose union is a piece, that with the highest score first. So every such pair is a
    merge, and all merges that end in one piece follow each other; those of pieces with equal scores, which are LLaMA's
    runs of spaces, may alternate.
    """
    known, joined = set(pieces), {(left, right) for left, right in merges}
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair not in joined and known.issuperset(pair):
                raise _unknown(source, f"never joins {pair[0]!r} and {pair[1]!r}, though it has a piece {piece!r}")
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    scores, group, end = {}, 0, -1
    equal: list[str] = []
    for piece, rank in first.items():  # in the order of their ranks
        if rank > end:
            group, equal = rank, []
        equal.append(piece)
        end = max(end, last[piece])
        if len(equal) > 1 and any(set(other) != {piece[0]} for other in equal):
            raise _unknown(source, f"has merges that no scores of pieces stand for ({equal[0]!r}, {piece!r})")
        scores[piece] = -float(group)
    return scores
