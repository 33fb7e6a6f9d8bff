"""`Prompting`: what a task makes of turns, or of a record without its answer, so that a model goes on from there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, device

from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.answers import Exchange, turn_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SOME = "a"
"""An answer, to see what training would write around one."""
Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}; a LLaVA's user has a mark for each picture."""


@dataclass(frozen=True)
class Picture:
    """Where a prompt's picture is: the file `path`, or, `in_image_folder`, what has that path below the run's
    data.image_folder, which each node may have elsewhere.
    """

    path: str
    in_image_folder: bool = field(default=False, kw_only=True)

    def file(self, image_folder: Path) -> Path:
        """The file on the node whose data.image_folder this is."""
        return image_folder / self.path if self.in_image_folder else Path(self.path)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model reads before it answers.

    text: as training rendered it. ids: its tokens, as many as do not depend on the answer; begins: the text after
    them that an answer has to begin with, which is not part of its words. ends: tokens that end an answer, besides
    the tokenizer's end of sequence; stop: a text that does, where none of them does.
    """

    text: str
    ids: list[int]
    begins: str = ""
    ends: tuple[int, ...] = ()
    stop: str | None = None
    pictures: tuple[Picture, ...] = ()


class Prompting(ABC):
    """One model's prompts. name: what they follow, in words. remembers: whether a prompt holds earlier turns.
    takes_system, takes_pictures: whether it can hold an instruction for the whole conversation, and pictures.
    positions: how many tokens the model reads at most, where its configuration says so. dtype: what the model is
    loaded in unless told otherwise.
    """

    name: str
    remembers: bool
    takes_system: bool
    takes_pictures: bool = False
    tokenizer: PreTrainedTokenizerFast
    positions: int | None
    dtype: str

    @abstractmethod
    def of_turns(self, turns: Sequence[Message], pictures: Sequence[Picture] = ()) -> Prompt:
        """The prompt before the assistant's answer to the last turn, a user's. Raises UserError."""

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record with what `fields` names, where the records of a run have it otherwise. Raises UserError."""
        return record

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, type]:
        """What a record must have for `of_record`."""

    @abstractmethod
    def of_record(self, record: Mapping[str, Any], system: str | None = None) -> Prompt:
        """The prompt of a record, whose own answer does not count; `system` for one that has none. Raises UserError."""

    def asked(self, record: Mapping[str, Any]) -> tuple[Prompt, str]:
        """A record of training as the prompt before its last answer, and that answer. Raises UserError."""
        raise UserError(f"prompts of {self.name} are not made of records of training")

    def shown(self, text: str, pictures: int) -> str:
        """A user's turn about so many pictures: with a mark for each, where it has none."""
        return text

    def inputs(self, prompts: Sequence[Prompt], place: device) -> dict[str, Tensor]:
        """What the model reads of a batch besides tokens. Raises UserError for a picture that cannot be read."""
        return {}

    def opened(self, said: str, system: str | None, pictures: int = 0) -> list[Message]:
        """The turns of a conversation that begins with what a user said, about so many pictures."""
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": self.shown(said, pictures)}]

    def room(self, prompt: Prompt, wanted: int) -> int:
        """How many tokens an answer can have, at most `wanted`. Raises UserError if there is room for none."""
        if self.positions is None:
            return wanted
        if (left := self.positions - len(prompt.ids)) < 1:
            raise UserError(f"it has {len(prompt.ids):,} tokens, and the model reads {self.positions:,} at most")
        return min(left, wanted)


def before(each: Exchange, tokenizer: PreTrainedTokenizerFast) -> Prompt:
    """The prompt of an exchange whose answer is SOME."""
    ids, held = _tokens_before(each, tokenizer)
    ends, stop = turn_ends([each], tokenizer)
    return Prompt(text=each.prompt, ids=ids, begins=held + each.lead, ends=tuple(ends), stop=stop)


def _tokens_before(each: Exchange, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], str]:
    """The tokens of the prompt that are the same whatever answer follows, and the blanks behind them that are not: a
    tokenizer may draw blanks into the answer's first token, and then so did training.
    """
    how: Any = {"add_special_tokens": not each.complete, "verbose": False}
    encoded = tokenizer(each.text, return_offsets_mapping=True, **how)
    stops = [stop for _, stop in encoded["offset_mapping"]]
    count = next((i for i, stop in enumerate(stops) if stop > len(each.prompt)), len(stops))
    held = each.prompt[max(stops[:count], default=0) :]
    if count and not held.strip():
        return list(encoded["input_ids"][:count]), held
    alone: list[int] = tokenizer(each.prompt, **how)["input_ids"]
    ended = not each.complete and alone[-1:] == [tokenizer.eos_token_id]  # some put one behind every text
    return alone[:-1] if ended else alone, ""
