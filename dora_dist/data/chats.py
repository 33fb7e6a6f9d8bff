"""Conversations as records have them, in the forms of OpenAI and of ShareGPT, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dora_dist.config.names import SPEAKERS
from dora_dist.data.files import shown
from dora_dist.runtime.errors import UserError

_FROM = {
    **SPEAKERS,
    "chatgpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
}
"""Values of "from" in ShareGPT's form, and the roles that they mean."""
_MARKS = ("weight", "train")
_SHARED = ("from", "value")


@dataclass(frozen=True)
class Chat:
    """Messages as a chat template takes them; for each whether it is learnt (None: as its role says); tools, if any."""

    messages: list[dict[str, Any]]
    marks: tuple[bool | None, ...]
    tools: list[dict[str, Any]] | None

    def learnt(self, roles: tuple[str, ...]) -> list[bool]:
        """Which messages are learnt where those of these roles are."""
        pairs = zip(self.messages, self.marks, strict=True)
        return [message["role"] in roles if mark is None else mark for message, mark in pairs]


def read_chat(record: Mapping[str, Any], field: str) -> Chat:
    """The conversation that a record has in `field`: messages with "role" and "content", or "from" and "value".

    A content is a text or a list of parts {"type": "text", "text": ...}. An assistant's message may have "tool_calls",
    with the arguments as an object or as JSON. "weight" (0 or 1) or "train" (true or false) says whether a message is
    learnt. The record may have a "system" text and "tools", a list of JSON schemas or JSON of one. Raises UserError.
    """
    given = record[field]
    if not given:
        raise UserError(f'"{field}" is empty')
    messages = [_message(turn, message) for turn, message in enumerate(given, start=1)]
    marks = [_mark(turn, message) for turn, message in enumerate(given, start=1)]
    system = record.get("system")
    if system and messages[0]["role"] != "system":
        if not isinstance(system, str):
            raise UserError(f'"system" must be a string, found {shown(system)}')
        messages, marks = [{"role": "system", "content": system}, *messages], [None, *marks]
    return Chat(messages, tuple(marks), _tools(record.get("tools")))


def listed_in(value: Any) -> Any:
    """A list, also where the cell of a table holds it as JSON; anything else as it is."""
    parsed = _parsed(value) if isinstance(value, str) else value
    return parsed if isinstance(parsed, list) else value


def texts_of(message: Mapping[str, Any]) -> str:
    """What a message says: its content, else its tool calls."""
    return message["content"] or (json.dumps(message["tool_calls"]) if message.get("tool_calls") else "")


def joined(turn: int, parts: list[Any], picture: str | None = None) -> str:
    """The text of a list of parts; `picture` stands for each picture, None: there may be none. Raises UserError."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url") and picture is not None:
            texts.append(picture)
        elif kind in ("image", "image_url"):
            raise UserError(
                f'message {turn} has a picture in its content; pictures are for model.task = "image_text_to_text" with '
                'data.format = "llava"'
            )
        else:
            raise UserError(
                f'message {turn} has a part of its content that is not {{"type": "text", "text": "..."}}: {shown(part)}'
            )
    return "".join(texts)


def _message(turn: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f'message {turn} must be an object with "role" and "content", found {shown(message)}')
    given = message
    # A Parquet column gives every message every field, and templates ask whether one is there, not whether it is null.
    message = {name: value for name, value in given.items() if name not in _MARKS and value is not None}
    if "from" in message and "role" not in message:
        message = given = _of_sharegpt(turn, message)
    if not isinstance(message.get("role"), str):
        raise UserError(f'message {turn} must have a string "role", found {_found(given, "role")}')
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = _calls(turn, calls)
    content = message.get("content")
    if isinstance(content, list):
        content = joined(turn, content)
    elif content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise UserError(f'message {turn} must have a string "content", found {_found(given, "content")}')
    return {**message, "content": content}


def _of_sharegpt(turn: int, message: dict[str, Any]) -> dict[str, Any]:
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str):
        raise UserError(f'message {turn} must have a string "from", found {_found(message, "from")}')
    if not isinstance(value, str | list):
        raise UserError(f'message {turn} must have a string "value", found {_found(message, "value")}')
    rest = {name: given for name, given in message.items() if name not in _SHARED}
    role = _FROM.get(speaker, speaker)
    if speaker != "function_call":
        return {**rest, "role": role, "content": value}
    called = _parsed(value)
    if not isinstance(called, dict | list):
        raise UserError(f'message {turn} is from "function_call" and must hold JSON of its calls, found {shown(value)}')
    return {**rest, "role": role, "tool_calls": called if isinstance(called, list) else [called]}


def _calls(turn: int, calls: Any) -> list[dict[str, Any]]:
    """Tool calls as templates take them: arguments as an object."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f'message {turn}: each of its "tool_calls" must be {{"function": {{"name": "...", "arguments": '
                f"{{...}}}}}}, found {shown(call)}"
            )
        others = {name: value for name, value in call.items() if name not in ("function", "name", "arguments")}
        found.append({"type": "function", **others, "function": {**function, "arguments": arguments}})
    return found


def _tools(given: Any) -> list[dict[str, Any]] | None:
    tools = _parsed(given) if isinstance(given, str) else given
    if not given or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f'"tools" must be a list of objects that describe functions by JSON schemas, found {shown(given)}'
        )
    return tools


def _mark(turn: int, message: Mapping[str, Any]) -> bool | None:
    """Whether a message says of itself that it is learnt."""
    said = {name: message[name] for name in _MARKS if message.get(name) is not None}
    for name, value in said.items():
        if value not in (0, 1):
            wanted = "0 or 1" if name == "weight" else "true or false"
            raise UserError(f'message {turn}: "{name}" must be {wanted}, found {shown(value)}')
    if len(set(map(bool, said.values()))) > 1:
        raise UserError(f'message {turn}: "weight" and "train" contradict each other; keep one')
    return bool(next(iter(said.values()))) if said else None


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _found(message: Mapping[str, Any], name: str) -> str:
    return "null" if message.get(name, "") is None else shown(message.get(name, "nothing"))
