"""A model that answers prompts in its own words, in one process: token by token, or several prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, TextStreamer

from dora_dist.evaluation.inference import EvaluatedModel
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import task_named
from dora_dist.tasks.evaluations.generation import beam_search
from dora_dist.tasks.prompting.base import Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig

ENDED, TOO_LONG, INTERRUPTED = "end", "length", "interrupted"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest one, or (where one of the first three is given) drawn.

    max_new_tokens: the longest answer, cut where the model reads no further. temperature: 0 is the likeliest. top_p,
    top_k: drawn from the likeliest tokens that have this probability together, or from so many. repetition_penalty:
    above 1 makes what was said before less likely. seed: of what is drawn.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError, by the option's name, for a number that means nothing."""
        for name, right, range in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature is None or 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "above 0"),
        ):
            if not right:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {range}")
        if self.temperature == 0 and (self.top_p, self.top_k) != (None, None):
            raise UserError("--temperature 0: takes the likeliest token, so --top-p and --top-k mean nothing with it")

    @property
    def draws(self) -> bool:
        return bool(self.temperature) or (self.top_p, self.top_k) != (None, None)


@dataclass(frozen=True)
class Answer:
    """What a model said. tokens: how many it wrote. ended: why it stopped, "end", "length" or "interrupted"."""

    text: str
    tokens: int
    ended: str


class Speaker:
    """A model and how it is asked; `load` reads its weights, and `answers` asks it."""

    def __init__(
        self,
        path: str,
        *,
        base: str | None = None,
        format: str | None = None,
        chat_template: str | None = None,
        dtype: str | None = None,
    ) -> None:
        """path, base and dtype: as of `evaluate`. Raises UserError for what is no model, or writes no texts."""
        self.model: Any = None
        self._subject = EvaluatedModel(path, base)
        head = self._subject.head
        prompting = task_named(head.task).prompting(self._subject, format=format, chat_template=chat_template)
        if prompting is None:
            raise UserError(
                f"{path}: its task is {head.task}, which answers no prompts; measure it (dora-dist evaluate)"
            )
        self.prompting, self._dtype = prompting, dtype or prompting.dtype

    def load(self) -> None:
        """Raises UserError as `load_for_inference` does."""
        self.model = self._subject.load(self._dtype)

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        write: Callable[[str], object] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """The model's answer to each prompt, together, in batches padded on the left.

        write: is called with each piece of the text of a single prompt's answer as it comes. interrupted: asked after
        each token whether to stop. Raises UserError for a prompt that is too long, and for NaN in the model.
        """
        tokenizer, place = self.prompting.tokenizer, next(self.model.parameters()).device
        new = min(self.prompting.room(prompt, sampling.max_new_tokens) for prompt in prompts)
        ids = {"input_ids": [prompt.ids for prompt in prompts]}
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(place)
        ends = {tokenizer.eos_token_id, *_own_ends(self.model), *(end for prompt in prompts for end in prompt.ends)}
        stop = next((prompt.stop for prompt in prompts if prompt.stop), None)
        if sampling.draws:
            torch.manual_seed(sampling.seed)
        output = self.model.generate(
            **batch,
            **self.prompting.inputs(prompts, place),
            generation_config=_config(tokenizer, sampling, new, ends=ends, stop=stop),
            tokenizer=tokenizer if stop else None,
            stopping_criteria=[_Interrupted(interrupted)],
            streamer=_Streamer(tokenizer, prompts[0].begins, stop, write) if write else None,
        )[:, batch["input_ids"].shape[1] :].tolist()
        return [
            _answer(tokenizer, row, prompt, ends, stop=stop, interrupted=interrupted())
            for row, prompt in zip(output, prompts, strict=True)
        ]


def _own_ends(model: Any) -> list[int]:
    """What the model's generation_config.json ends a turn with: some models have several such tokens."""
    own = model.generation_config.eos_token_id
    return list(own) if isinstance(own, list) else [] if own is None else [own]


def _config(
    tokenizer: Any, sampling: Sampling, max_new_tokens: int, *, ends: set[int], stop: str | None
) -> GenerationConfig:
    config = beam_search(tokenizer, num_beams=1, max_new_tokens=max_new_tokens, stop=stop, ends=sorted(ends))
    if sampling.draws:
        drawn = {
            "temperature": sampling.temperature or 1.0,
            "top_p": sampling.top_p or 1.0,
            "top_k": sampling.top_k or 0,
        }
        config.update(do_sample=True, **drawn)
    config.update(repetition_penalty=sampling.repetition_penalty or 1.0)
    return config


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
