"""A model's answers to prompts, in its own words, several prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from dora_dist.tasks.evaluations.generation import beam_search
from dora_dist.tasks.prompting.base import Prompt

ENDED, TOO_LONG, INTERRUPTED = "end", "length", "interrupted"


@dataclass(frozen=True)
class Answer:
    """What a model said. tokens: how many it wrote. ended: why it stopped, "end", "length" or "interrupted"."""

    text: str
    tokens: int
    ended: str


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    place: torch.device,
    max_new_tokens: int,
    inputs: Mapping[str, Tensor],
    drawn: Mapping[str, Any] | None = None,
    write: Callable[[str], object] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    sharded: bool = False,
) -> list[Answer]:
    """The answer to each prompt of a model in evaluation mode, together, in one batch padded on the left.

    place: where the model computes. inputs: what it reads besides tokens. drawn: settings of transformers'
    GenerationConfig besides those of the likeliest token each time. write: is called with each piece of the text of a
    single prompt's answer as it comes. interrupted: asked after each token whether to stop. sharded: ranks gather
    weights together, so that one that is done goes on for the others.
    """
    ids = {"input_ids": [prompt.ids for prompt in prompts]}
    batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(place)
    ends = {tokenizer.eos_token_id, *_own_ends(model), *(end for prompt in prompts for end in prompt.ends)}
    stop = next((prompt.stop for prompt in prompts if prompt.stop), None)
    config = beam_search(tokenizer, num_beams=1, max_new_tokens=max_new_tokens, stop=stop, ends=sorted(ends))
    config.update(use_cache=True, **(drawn or {}))
    output = model.generate(
        **batch,
        **inputs,
        generation_config=config,
        tokenizer=tokenizer if stop else None,
        stopping_criteria=[_Interrupted(interrupted)],
        streamer=_Streamer(tokenizer, prompts[0].begins, stop, write) if write else None,
        synced_gpus=sharded,
    )[:, batch["input_ids"].shape[1] :].tolist()
    return [
        _answer(tokenizer, row, prompt, ends, stop=stop, interrupted=interrupted())
        for row, prompt in zip(output, prompts, strict=True)
    ]


def _own_ends(model: Any) -> list[int]:
    """What the model's generation_config.json ends a turn with: some models have several such tokens."""
    own = model.generation_config.eos_token_id
    return list(own) if isinstance(own, list) else [] if own is None else [own]


def _answer(
    tokenizer: Any, row: list[int], prompt: Prompt, ends: set[int], *, stop: str | None, interrupted: bool
) -> Answer:
    count = next((i for i, token in enumerate(row) if token in ends), len(row))
    text = tokenizer.decode(row[:count], skip_special_tokens=True)
    ended = count < len(row)
    if stop and stop in text:
        text, ended = text.partition(stop)[0], True
    return Answer(_own_words(text, prompt.begins).rstrip(), count, _why(ended, interrupted))


def _why(ended: bool, interrupted: bool) -> str:
    return ENDED if ended else INTERRUPTED if interrupted else TOO_LONG


def _own_words(text: str, begins: str) -> str:
    return text.lstrip().removeprefix(begins.strip()).lstrip() if begins else text


class _Interrupted(StoppingCriteria):
    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._interrupted(), device=input_ids.device)


class _Streamer(TextStreamer):
    """Writes words as they are complete, without what an answer has to begin with, up to the text that ends it."""

    def __init__(self, tokenizer: Any, begins: str, stop: str | None, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begins, self._stop, self._write = begins, stop, write
        self._held = ""  # what may be the beginning of `stop`
        self._begun: str | None = "" if begins else None  # what has come so far of the beginning

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._begun is not None:
            self._begun = f"{self._begun}{text}"
            if self._begins.strip().startswith(self._begun.lstrip()) and not stream_end:
                return  # not more than what it begins with yet
            text, self._begun = _own_words(self._begun, self._begins), None
        self._write(self._before_stop(text, stream_end))

    def _before_stop(self, text: str, stream_end: bool) -> str:
        stop, text = self._stop, self._held + text
        if not stop:
            return text
        if stop in text:
            self._held = text[text.index(stop) :]  # nothing behind it is written either
            return text[: text.index(stop)]
        may_begin = 0 if stream_end else max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - may_begin :]
        return text[: len(text) - may_begin]
