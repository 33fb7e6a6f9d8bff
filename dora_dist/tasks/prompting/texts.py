"""Prompts of a language model: the records' format of its training, or the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dora_dist.data.chats import read_chat, texts_of
from dora_dist.data.formats import FORMATS, asked_as, check_template, templated_prompt
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.answers import ANSWERED, CHAT, exchange
from dora_dist.tasks.evaluations.base import Subject
from dora_dist.tasks.evaluations.lengths import positions_of
from dora_dist.tasks.prompting.base import SOME, Message, Picture, Prompt, Prompting, before

PLAIN = "completion"


class TextPrompting(Prompting):
    """format: of the records; None: as the run says in which the model was trained, else chats where the tokenizer has
    a chat template, else plain texts. Raises UserError for a format that has no prompt, or no chat template.
    """

    def __init__(self, subject: Subject, format: str | None) -> None:
        self.tokenizer, self.positions = subject.tokenizer, positions_of(subject.base)
        self.dtype = "bf16"
        run = subject.run.get("data", {})
        of_run, self._prepare = asked_as(run if not format else {})
        self._format = format or of_run or self._usual()
        if self._format not in ANSWERED:
            raise UserError(f"--format {self._format}: is unknown; give one of {', '.join(ANSWERED)}")
        if self._format == CHAT:
            check_template(self.tokenizer)
        self.remembers = self.takes_system = self._format == CHAT
        self.name = "the tokenizer's chat template" if self.remembers else f'the format "{self._format}"'

    def _usual(self) -> str:
        usual = CHAT if self.tokenizer.chat_template else PLAIN
        note(f'prompts are of the format "{usual}", since no run says in which the model was trained; --format says it')
        return usual

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return record if self._prepare is None else self._prepare(dict(record))

    @property
    def fields(self) -> Mapping[str, type]:
        needed = FORMATS[self._format].fields
        return {field: kind for field, kind in needed.items() if field != ANSWERED[self._format]}

    def of_turns(self, turns: Sequence[Message], pictures: Sequence[Picture] = ()) -> Prompt:
        if pictures:
            raise UserError("--image: the model reads no pictures; leave it out")
        if self.remembers:
            return self._of_chat([dict(turn) for turn in turns], None)
        system = next((turn["content"] for turn in turns if turn["role"] == "system"), None)
        asked = next(iter(self.fields))
        return self.of_record(self.prepared({asked: turns[-1]["content"]}), system)

    def of_record(self, record: Mapping[str, Any], system: str | None = None) -> Prompt:
        if not self.remembers:
            if system is not None:
                raise UserError(f"--system: prompts of {self.name} have no place for it; leave it out")
            given = {**record, str(ANSWERED[self._format]): SOME}
            return before(exchange(given, self._format, SOME, self.tokenizer), self.tokenizer)
        chat = read_chat(record, CHAT)
        messages = list(chat.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UserError('"messages" asks nothing: it needs a turn of the user')
        led = messages[0]["role"] == "system"
        first = [] if system is None or led else [{"role": "system", "content": system}]
        return self._of_chat([*first, *messages], chat.tools)

    def asked(self, record: Mapping[str, Any]) -> tuple[Prompt, str]:
        record = self.prepared(record)
        if not self.remembers:
            return self.of_record(record), record[str(ANSWERED[self._format])]
        chat = read_chat(record, CHAT)
        last = max((turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"), default=0)
        if not last:
            raise UserError('"messages" has no turn of the assistant that answers something')
        return self._of_chat(chat.messages[:last], chat.tools), texts_of(chat.messages[last])

    def _of_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Prompt:
        text = templated_prompt(messages, self.tokenizer, tools)
        answered = {"messages": [*messages, {"role": "assistant", "content": SOME}], "tools": tools}
        try:
            return before(exchange(answered, CHAT, SOME, self.tokenizer), self.tokenizer)
        except UserError:  # the template writes an earlier turn differently once an answer follows
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            return Prompt(text=text, ids=ids)
