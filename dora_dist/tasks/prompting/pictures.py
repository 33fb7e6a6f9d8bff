"""Prompts of a LLaVA: conversations with pictures under the template of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, device

from dora_dist.data.conversations import (
    MARK,
    Conversation,
    picture_paths,
    read_conversation,
    render,
    render_turns,
    with_conversations,
)
from dora_dist.models.families import load_processor
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.answers import Exchange
from dora_dist.tasks.evaluations.base import Subject
from dora_dist.tasks.evaluations.lengths import positions_of
from dora_dist.tasks.evaluations.pictures import data_of
from dora_dist.tasks.prompting.base import SOME, Message, Picture, Prompt, Prompting, before


class PicturePrompting(Prompting):
    """chat_template: as data.chat_template; None: the run's in which the model was trained, else the configuration's
    default.
    """

    takes_pictures = True

    def __init__(self, task: str, subject: Subject, chat_template: str | None) -> None:
        given = {} if chat_template is None else {"chat_template": chat_template}
        self._data = data_of(task, subject, {**given, "image_folder": "."})  # the reader is given whole paths
        self._subject, self._template = subject, self._data.chat_template
        self._image_folder = Path(subject.run.get("data", {}).get("image_folder") or ".")
        self.name = f'data.chat_template "{self._template}"'
        self.remembers, self.takes_system = self._template != "plain", self._template == "model"
        self.positions = positions_of(subject.base)
        self.dtype = subject.run.get("model", {}).get("dtype", "bf16")
        self.tokenizer = self._processor.tokenizer

    @cached_property
    def _processor(self) -> Any:
        return load_processor(self._subject.base, self._data, self._subject.run.get("model", {}).get("tokenizer"))

    @property
    def fields(self) -> Mapping[str, type]:
        return {"text": str}

    def of_record(self, record: Mapping[str, Any], system: str | None = None) -> Prompt:
        """A record {"text", "image": path, paths or absent} below the run's data.image_folder, or else below here."""
        pictures = _in_image_folder(picture_paths(record.get("image")))
        return self.of_turns(self.opened(record["text"], system, len(pictures)), pictures)

    def asked(self, record: Mapping[str, Any]) -> tuple[Prompt, str]:
        talk = read_conversation(with_conversations({**record}))
        turns = [{"role": role, "content": text} for role, text in talk.turns]
        return self.of_turns(turns[:-1], _in_image_folder(talk.pictures)), turns[-1]["content"]

    def shown(self, text: str, pictures: int) -> str:
        return text if MARK in text else f"{MARK}\n" * pictures + text

    def of_turns(self, turns: Sequence[Message], pictures: Sequence[Picture] = ()) -> Prompt:
        if not self.takes_system and any(turn["role"] == "system" for turn in turns):
            raise UserError(f"--system: prompts of {self.name} have one of their own; leave it out")
        said = [(turn["role"], turn["content"]) for turn in turns]
        if (marks := sum(text.count(MARK) for _, text in said)) != len(pictures):
            raise UserError(f"it has {marks} {MARK} in its text and {len(pictures)} pictures; give one for each")
        processor = self._processor
        template, token = self._template, processor.stands.token
        text = render_turns(said, template, self.tokenizer, token)
        answered = Conversation((*said, ("assistant", SOME)), tuple(picture.path for picture in pictures))
        whole = render(answered, template, self.tokenizer, token, spans=False).text
        if whole.startswith(text):
            start = whole.index(SOME, len(text))
            prompt = before(Exchange(text, whole, start, start + len(SOME), complete=True), self.tokenizer)
        else:  # the template writes a turn differently once an answer follows
            prompt = Prompt(text=text, ids=self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return replace(prompt, ids=processor.stands.widened(prompt.ids), pictures=tuple(pictures))

    def inputs(self, prompts: Sequence[Prompt], place: device) -> dict[str, Tensor]:
        """pixel_values (pictures, 3, height, width) fp32 of all pictures in order."""
        files = [picture.file(self._image_folder) for prompt in prompts for picture in prompt.pictures]
        found = [self._processor.reader(str(file)) for file in files]
        return {"pixel_values": torch.stack(found).to(place)} if found else {}


def _in_image_folder(paths: Sequence[str]) -> list[Picture]:
    return [Picture(path, in_image_folder=True) for path in paths]
