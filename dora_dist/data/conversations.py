"""LLaVA's conversations: from records to text with a mark for every picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from dora_dist.data.chats import joined
from dora_dist.data.formats import Rendered, templated, templated_prompt
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARK = "<image>"
"""The place of a picture in a record's text, whatever the model's token for pictures is."""
ROLES = {"human": "user", "gpt": "assistant"}
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# LLaVA's "vicuna_v1" for tokenizers that put a beginning-of-sequence token in front by themselves.
VICUNA_TEMPLATE = (
    "{{ bos_token }}" + VICUNA_SYSTEM + " {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Conversation:
    """Turns in order, from the first user's to the last assistant's, and the pictures that their marks stand for."""

    turns: tuple[tuple[str, str], ...]  # (role, text)
    pictures: tuple[str, ...]  # paths below the image folder


def read_conversation(record: dict[str, Any]) -> Conversation:
    """A record of LLaVA's JSON, checked: {"image": path or paths or absent, "conversations": [{"from", "value"}]}.

    Turns before the first human one are left out, as LLaVA does, and so are those after the last answer: nothing is
    learned from either. Raises UserError for an unknown speaker, turns that do not alternate, a number of marks that
    is not the number of pictures, and a path that leaves the image folder.
    """
    turns = [_turn(number, turn) for number, turn in enumerate(record["conversations"], start=1)]
    while turns and turns[0][0] != "user":
        turns.pop(0)
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise UserError("has no question with an answer")
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise UserError(f'"conversations" has two turns of the {role} in a row; human and gpt must take turns')
    pictures = picture_paths(record.get("image"))
    marks = sum(text.count(MARK) for _, text in turns)
    if marks != len(pictures):
        raise UserError(f'has {marks} {MARK} in its text and {len(pictures)} pictures in "image"; give one for each')
    return Conversation(tuple(turns), pictures)


def with_conversations(record: dict[str, Any]) -> dict[str, Any]:
    """A record of "messages" with "role" and "content", a text or a list of parts, as one of LLaVA's.

    A part {"type": "image"} may name its picture by "image", "path", "url" or "image_url"; else the record's "image"
    or "images" name them. Raises UserError.
    """
    messages = record.get("messages")
    if "conversations" in record or not isinstance(messages, list):
        return record
    turns, named = [], []
    speakers = {role: speaker for speaker, role in ROLES.items()}
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f'message {number} must be an object with "role" and "content"')
        content = message.get("content")
        if isinstance(content, list):
            named += [path for part in content if isinstance(part, dict) and (path := _picture(part)) is not None]
            content = joined(number, content, MARK)
        turns.append({"from": speakers.get(str(message.get("role")), message.get("role")), "value": content})
    image = named or record.get("image", record.get("images"))
    return {**record, "conversations": turns, "image": image}


def _picture(part: dict[str, Any]) -> str | None:
    """The path that a part of a content names, if it is a picture's and names one."""
    if part.get("type") not in ("image", "image_url"):
        return None
    given = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name) is not None), None)
    path = given.get("url") if isinstance(given, dict) else given
    if path is not None and (not isinstance(path, str) or "://" in path or path.startswith("data:")):
        raise UserError(
            "a picture of its content is not a path below data.image_folder; save it there, and give its path"
        )
    return path


def _turn(number: int, turn: Any) -> tuple[str, str]:
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(text, str):
        raise UserError(f'turn {number} must be an object with the strings "from" and "value"')
    if speaker not in ROLES:
        raise UserError(f"turn {number} is from {speaker!r}; known speakers are {', '.join(ROLES)}")
    return ROLES[speaker], text


def picture_paths(named: Any) -> tuple[str, ...]:
    """A record's "image" as paths below the image folder. Raises UserError for one that leaves it."""
    paths = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise UserError('"image" must be the path of a picture, or a list of paths')
    for path in paths:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f'"image": {path!r} leaves data.image_folder; give a path below it')
    return tuple(paths)


def render(
    conversation: Conversation, template: str, tokenizer: PreTrainedTokenizerFast, image_token: str, spans: bool
) -> Rendered:
    """The conversation as text with `image_token` for every picture; the assistant's turns are the answers.

    `template`: "vicuna_v1" (LLaVA-1.5's), "plain" (projector pre-training: pictures and caption, no question), or
    "model" (the tokenizer's own chat template). `spans`: whether the answers' ranges are wanted. Raises UserError if
    the text holds the image token by itself, and as the chat template does.
    """
    turns = [(role, _with_token(text, image_token)) for role, text in conversation.turns]
    if template == "model":
        return templated(_messages(turns, tokenizer, image_token), tokenizer, spans)
    return (_plain if template == "plain" else _vicuna)(turns, tokenizer, image_token)


def render_question(question: str, template: str, tokenizer: PreTrainedTokenizerFast, image_token: str) -> str:
    """What `render` writes before the answer to a conversation's first turn. Raises UserError as that does."""
    return render_turns([("user", question)], template, tokenizer, image_token)


def render_turns(
    turns: Sequence[tuple[str, str]], template: str, tokenizer: PreTrainedTokenizerFast, image_token: str
) -> str:
    """What `render` writes of a conversation before the answer to the last of these turns, a user's. Raises UserError
    as that does; under "plain", for more than one turn.
    """
    marked = [(role, _with_token(text, image_token)) for role, text in turns]
    if template == "model":
        return templated_prompt(_messages(marked, tokenizer, image_token), tokenizer)
    if template == "plain":
        if len(marked) > 1:
            raise UserError('data.chat_template = "plain" is for one question and one answer, which is the caption')
        return _pictures_alone(marked[0][1], tokenizer, image_token)
    return _vicuna(marked, tokenizer, image_token).text


def _with_token(text: str, image_token: str) -> str:
    if image_token != MARK and image_token in text:
        raise UserError(f"its text holds {image_token!r}, which is the model's token for pictures; take it out")
    return text.replace(MARK, image_token)


def _vicuna(turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, image_token: str) -> Rendered:
    text, answers = f"{_start(tokenizer)}{VICUNA_SYSTEM} ", []
    for role, content in turns:
        if role == "user":
            text += f"USER: {content} ASSISTANT:"
        else:
            start = len(text)
            text += f" {content}{tokenizer.eos_token}"
            answers.append((start, len(text)))
    return Rendered(text, tuple(answers), complete=True)


def _plain(turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, image_token: str) -> Rendered:
    if len(turns) != 2:
        raise UserError('data.chat_template = "plain" is for one question and one answer, which is the caption')
    (_, question), (_, caption) = turns
    text = _pictures_alone(question, tokenizer, image_token)
    return Rendered(f"{text}{caption}\n", ((len(text), len(text) + len(caption) + 1),), complete=True)


def _pictures_alone(question: str, tokenizer: PreTrainedTokenizerFast, image_token: str) -> str:
    return _start(tokenizer) + image_token * question.count(image_token)


def _messages(
    turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, image_token: str
) -> list[dict[str, Any]]:
    """What the tokenizer's own chat template takes."""
    if not tokenizer.chat_template:
        raise UserError(
            'data.chat_template = "model": the tokenizer has no chat template; use "vicuna_v1", or give the '
            "tokenizer of an instruction-tuned model"
        )
    typed = _takes_parts(tokenizer, str(tokenizer.chat_template), image_token)
    return [{"role": role, "content": _parts(text, image_token) if typed else text} for role, text in turns]


def _parts(text: str, image_token: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, part in enumerate(text.split(image_token)):
        parts += [{"type": "image"}] * bool(number)
        parts += [{"type": "text", "text": part.strip()}] * bool(part.strip())
    return parts


@lru_cache(maxsize=2)
def _takes_parts(tokenizer: PreTrainedTokenizerFast, chat_template: str, image_token: str) -> bool:
    """Whether the chat template wants a turn's content as a list of typed parts, as those for pictures often do.

    `chat_template` is the tokenizer's own, for which this is remembered.
    """
    try:
        text = templated([{"role": "user", "content": _parts(f"{image_token}a", image_token)}], tokenizer, False).text
    except UserError:
        return False
    return image_token in text and "'type'" not in text


@lru_cache(maxsize=2)
def _start(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that the tokenizer puts in front of a text by itself, if it does."""
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if tokenizer.bos_token_id in ids[:1] else ""
